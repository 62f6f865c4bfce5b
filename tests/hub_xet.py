"""The receiving side of Xet uploads, from its published specification: xorbs hold chunks, shards say which make a file.

Only uncompressed chunks are understood (`HF_XET_XORB_COMPRESSION_POLICY=none`), because LZ4 is not in Python.
"""

import hashlib
import struct

_END = b"\xff" * 32
_HAS_VERIFICATION, _HAS_METADATA = 1 << 31, 1 << 30
_RECORD = 48


def hash_string(raw: bytes) -> str:
    """Return a hash as Xet writes it: four little-endian 64-bit numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


class XetStore:
    """Uploaded xorbs, as lists of their chunks."""

    def __init__(self) -> None:
        self._xorbs: dict[str, list[bytes]] = {}

    def add_xorb(self, xorb_hash: str, body: bytes) -> None:
        """Keep the chunks of one xorb; what follows the last chunk is a footer."""
        chunks, at = [], 0
        while at < len(body) and body[at] == 0:
            stored = int.from_bytes(body[at + 1 : at + 4], "little")
            assert body[at + 4] == 0, "compressed chunk"
            chunks.append(body[at + 8 : at + 8 + stored])
            at += 8 + stored
        self._xorbs[xorb_hash] = chunks

    def files_of_shard(self, shard: bytes) -> dict[str, bytes]:
        """Put together every file that a shard describes, by its sha256.

        Raises:
            ValueError: a xorb is not there, or the chunks do not make the file that was announced.
        """
        at, files = _RECORD, {}
        while shard[at : at + 32] != _END:
            flags, num_terms = struct.unpack_from("<II", shard, at + 32)
            terms = [at + _RECORD * (1 + i) for i in range(num_terms)]
            data = b"".join(self._term(shard, term) for term in terms)
            at += _RECORD * (1 + num_terms * (2 if flags & _HAS_VERIFICATION else 1))
            if not flags & _HAS_METADATA:
                raise ValueError("a file without its sha256")
            sha256 = hash_string(shard[at : at + 32])
            if hashlib.sha256(data).hexdigest() != sha256:
                raise ValueError("the chunks are not those of the file")
            files[sha256] = data
            at += _RECORD
        return files

    def _term(self, shard: bytes, at: int) -> bytes:
        xorb_hash = hash_string(shard[at : at + 32])
        if xorb_hash not in self._xorbs:
            raise ValueError(f"xorb {xorb_hash} was never uploaded")
        first, last = struct.unpack_from("<II", shard, at + 40)
        return b"".join(self._xorbs[xorb_hash][first:last])
