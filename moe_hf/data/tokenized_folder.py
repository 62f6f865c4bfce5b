"""What a folder of tokenized shards consists of, and whether it is whole.

    tokens/
        tokens.json                what is in it: written last, into a folder that is renamed when it is finished
        tokenizer/                 the tokenizer, as `save_pretrained` writes it
        train/00000.arrow …        Arrow streams with one row, `input_ids`, for each document
        validation/00000.arrow …

Everything here is cheap and imports neither torch nor `datasets`: every rank does it before it joins the others.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD_NAME = "tokens.json"
TOKENIZER_NAME = "tokenizer"

_FORMAT = 1
# Text with what tokenizers treat differently: case, accents, numbers, white space, several scripts, code.
_PROBE = "The quick Brown fox – naïve café, 12345.67 €!\n\n\tdef f(x):\n        return x**2  # 東京 Ελλάδα नमस्ते 🙂"


@dataclass(frozen=True)
class Shard:
    """One file of token ids: its path within the folder, its size in bytes, and what it holds."""

    file: str
    size: int
    num_documents: int
    num_tokens: int


@dataclass(frozen=True)
class SplitRecord:
    """The shards of one split, in the order of the documents.

    Attributes:
        source: where the text came from, in the user's words.
        is_lines: documents are lines of text files, joined without anything between them.
        shards: at least one.
    """

    source: str
    is_lines: bool
    shards: tuple[Shard, ...]

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards, with those that end documents."""
        return sum(shard.num_tokens for shard in self.shards)


@dataclass(frozen=True)
class FolderRecord:
    """What `tokens.json` says.

    Attributes:
        tokenizer: name or folder that it was loaded from, for messages.
        fingerprint: what `tokenizer_fingerprint` returns for it.
        vocab_size: one more than the largest token id that it can return.
        eos_token_id: ends every document; `None` when nothing does.
        dtype: of the token ids, `"uint16"` or `"uint32"`.
        splits: `"train"` and perhaps `"validation"`.
    """

    tokenizer: str
    fingerprint: str
    vocab_size: int
    eos_token_id: int | None
    dtype: str
    splits: dict[str, SplitRecord]


def write_record(folder: Path, record: FolderRecord) -> None:
    """Write `tokens.json` into a folder that is otherwise complete."""
    content = {"format": _FORMAT, **asdict(record)}
    (folder / RECORD_NAME).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(folder: str | Path) -> FolderRecord:
    """Return what `tokens.json` of a folder says.

    Raises:
        DataError: There is no such folder, or it is unfinished, of another version or damaged.
    """
    path = Path(folder).expanduser() / RECORD_NAME
    if not path.parent.is_dir():
        raise DataError(f"tokenized_data {str(folder)!r} is not a folder; give one that moe-hf tokenize has written")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format")
        if version != _FORMAT:
            raise DataError(
                f"{path} has the format {version!r}, and this version of moe_hf reads {_FORMAT}; tokenize the data "
                "again, or use the version that wrote it"
            )
        splits = {
            name: SplitRecord(**split | {"shards": tuple(Shard(**shard) for shard in split["shards"])})
            for name, split in content.pop("splits").items()
        }
        return FolderRecord(splits=splits, **content)
    except FileNotFoundError:
        raise DataError(
            f"tokenized_data {str(folder)!r} has no {RECORD_NAME}, so moe-hf tokenize has not finished it"
        ) from None
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); tokenize the data again") from None


def check_shards(folder: str | Path, record: FolderRecord) -> None:
    """Refuse a folder in which a shard is missing or has another size than it was written with.

    Raises:
        DataError: It names the first such file.
    """
    for split in record.splits.values():
        for shard in split.shards:
            path = Path(folder).expanduser() / shard.file
            if not path.is_file():
                raise DataError(f"tokenized_data {str(folder)!r} lacks {shard.file}; copy or tokenize the data again")
            if (size := path.stat().st_size) != shard.size:
                raise DataError(
                    f"{path} has {size:,} bytes instead of {shard.size:,}, so it is cut off or changed; copy or "
                    "tokenize the data again"
                )


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a digest that is the same for all copies of a tokenizer, and another for one that tokenizes differently.

    Made of the vocabulary, the eos token and the ids of a probe, and not of files, which are written differently by
    each version of the library that saves them.
    """
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, tokenizer(_PROBE)["input_ids"]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
