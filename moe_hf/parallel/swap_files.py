"""The files in which DeepSpeed rests tensors on NVMe: reading without memory, writing, and noticing a full disk."""

import os
import shutil
from pathlib import Path

import torch

from ..errors import ConfigError


def read_mapped(path: Path, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the first `numel` elements of a swap file as a vector whose pages are read when they are looked at."""
    return torch.from_file(str(path), shared=False, size=numel, dtype=dtype)


def write_swap_file(path: Path, values: torch.Tensor, length: int) -> None:
    """Write a vector as DeepSpeed would: filled up with zeros to `length` elements, which it reads.

    Raises:
        OSError: the disk is full.
    """
    with open(path, "wb") as file:
        values.detach().cpu().contiguous().numpy().tofile(file)
        file.truncate(length * values.element_size())
        file.flush()
        os.fsync(file.fileno())


def check_file(path: Path, num_bytes: int) -> None:
    """Raise `ConfigError` unless a file was written to its end and has all its blocks.

    DeepSpeed's asynchronous writes do not say when the disk is full: a file ends early or has holes. File systems that
    compress have holes too, but then there is room.
    """
    found, free = os.stat(path), shutil.disk_usage(path).free
    has_holes = found.st_blocks * 512 < num_bytes and free < num_bytes
    if found.st_size < num_bytes or has_holes:
        raise ConfigError(
            f"{path} could not be written to its end, and {free / 1e6:.0f} MB are free there: free some on the disk of "
            "--nvme_path, and go on with --resume_from_checkpoint auto."
        )


class CheckedHandle:
    """DeepSpeed's handle for asynchronous reads and writes, which looks at what it has written.

    Args:
        handle: of the operator `async_io`.
    """

    def __init__(self, handle) -> None:
        self._handle, self._written = handle, {}

    def __getattr__(self, name: str):
        return getattr(self._handle, name)

    def async_pwrite(self, buffer: torch.Tensor, path: str, offset: int = 0) -> int:
        """Begin to write; `wait` tells how it went."""
        self._written[path] = offset + buffer.nbytes
        return self._handle.async_pwrite(buffer, path, offset)

    def wait(self) -> int:
        """Wait for everything begun and return how much that was.

        Raises:
            ConfigError: something was not written to its end.
        """
        count = self._handle.wait()
        written, self._written = self._written, {}
        for path, num_bytes in written.items():
            check_file(Path(path), num_bytes)
        return count
