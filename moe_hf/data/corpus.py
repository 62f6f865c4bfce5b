"""A corpus that every machine already has, and a tokenizer trained on it in seconds.

The source of the Python standard library lets a first run start without a download: real text with structure to
learn, the same on every machine with the same Python. It is written once, one row per file, and both the corpus
and the tokenizer are published by renaming a finished folder, so that several processes may ask for them at once.
"""

import hashlib
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..errors import DataError

END_OF_TEXT = "<|endoftext|>"
VALIDATION_EVERY = 20
VOCAB_MULTIPLE = 128
MAX_TRAINING_CHARS = 20_000_000

# Part of the cache keys: raise this when the rules below change, or users keep the corpus of the old ones.
_CACHE_VERSION = "1"

# Installed packages differ between machines; tests repeat the code they test; `encodings` is mostly tables of code
# points, a tenth of all bytes and nothing to learn from.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


def default_cache_dir() -> str:
    """Return the folder for the embedded corpus and its tokenizer inside the Hugging Face cache."""
    home = os.environ.get("HF_HOME") or os.path.join("~", ".cache", "huggingface")
    return os.path.join(os.path.expanduser(home), "moe_hf")


def write_corpus(cache_dir: str | None = None, source_root: str | None = None) -> tuple[str, str]:
    """Write the standard library's source as two parquet files with the column `text`, unless they are there.

    Args:
        cache_dir (`str`, *optional*): Folder to keep it in; `default_cache_dir()` when missing.
        source_root (`str`, *optional*): Folder to read `.py` files from; the standard library when missing.

    Returns:
        `tuple[str, str]`: Paths of the training and the validation file. Every twentieth file of the sorted list is
        for validation, so the split depends on nothing but the Python version.

    Raises:
        DataError: Fewer than two source files, as on a Python that ships its library compiled only.
    """
    root = Path(source_root or sysconfig.get_path("stdlib"))
    files = _source_files(root)
    # Names and sizes tell two libraries apart without reading ten megabytes in every process.
    listing = "\n".join(f"{file.relative_to(root).as_posix()} {file.stat().st_size}" for file in files)
    folder = Path(cache_dir or default_cache_dir()) / f"corpus-{_digest([_CACHE_VERSION, listing])}"
    if not folder.is_dir():
        # Each text once: some modules are copies of others, and a copy must not be in both splits.
        texts = list(dict.fromkeys(text for text in map(_read_text, files) if text is not None))
        if len(texts) < 2:
            raise DataError(f"the Python library at {str(root)!r} has no source files; give train_file or dataset_name")
        held_out = set(range(VALIDATION_EVERY - 1, len(texts), VALIDATION_EVERY)) or {len(texts) - 1}
        splits = {
            "train": [text for i, text in enumerate(texts) if i not in held_out],
            "validation": [text for i, text in enumerate(texts) if i in held_out],
        }
        with _publish_folder(folder) as private:
            for split, split_texts in splits.items():
                pq.write_table(pa.table({"text": split_texts}), private / f"{split}.parquet")
    return str(folder / "train.parquet"), str(folder / "validation.parquet")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose length is exactly a multiple of 128.

    The construction is GPT-2's: bytes are the alphabet, so no text is ever unknown. `<|endoftext|>` (id 0) begins
    and ends documents and serves as padding. Text too small for the wanted size leaves ids unused; these become
    `<|reserved_0|>`, `<|reserved_1|>`, ... so that the embedding's width divides well on every device.

    Args:
        texts (`Iterable[str]`): Documents; only the first 20 million characters are read, to stay within seconds.
        vocab_size (`int`): Wanted number of tokens, rounded up to a multiple of 128 and to at least 384.

    Returns:
        `PreTrainedTokenizerFast`: Untied to any file; `len()` of it is the rounded size.
    """
    size = _round_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_characters(texts, MAX_TRAINING_CHARS), trainer)
    missing = size - tokenizer.get_vocab_size()
    reserved = [AddedToken(f"<|reserved_{i}|>", special=True, normalized=False) for i in range(missing)]
    tokenizer.add_special_tokens(reserved)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,  # wherever it is loaded, decoding gives back the exact source
    )


def load_or_train_tokenizer(cache_dir: str | None = None, vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the embedded corpus, trained at the first call and read from the cache afterwards.

    Args:
        cache_dir (`str`, *optional*): Folder that keeps corpus and tokenizer; `default_cache_dir()` when missing.
        vocab_size (`int`, defaults to 8192): See `train_tokenizer`.

    Returns:
        `PreTrainedTokenizerFast`: The same in every process that uses the same Python.
    """
    train_file, _ = write_corpus(cache_dir)
    texts = pq.read_table(train_file).column("text").to_pylist()
    key = _digest([_CACHE_VERSION, str(_round_vocab_size(vocab_size)), *texts])
    folder = Path(cache_dir or default_cache_dir()) / f"tokenizer-{key}"
    if not folder.is_dir():
        tokenizer = train_tokenizer(texts, vocab_size)
        with _publish_folder(folder) as private:
            tokenizer.save_pretrained(private)
    # Read back even when it was just trained: the first run then uses the very object that later runs use.
    return AutoTokenizer.from_pretrained(folder)


def _source_files(root: Path) -> list[Path]:
    """List the `.py` files to read, in an order that is the same everywhere."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files = [file for file in files if file.is_file() and file.stat().st_size > 0]  # a broken link is no file
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _read_text(file: Path) -> str | None:
    """Return the file's text, or None when it is not UTF-8 (the library holds a few such files on purpose)."""
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def _round_vocab_size(vocab_size: int) -> int:
    # 256 bytes and one special token need 257 ids, so 384 is the smallest multiple that holds them.
    return max(3, -(-vocab_size // VOCAB_MULTIPLE)) * VOCAB_MULTIPLE


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8"))
        digest.update(b"\0")
    return digest.hexdigest()[:16]


@contextmanager
def _publish_folder(target: Path) -> Iterator[Path]:
    """Yield a private folder that becomes `target` when the block ends; of several writers the first one wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    private = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield private
        private.chmod(0o755)  # mkdtemp hides it from other users, who may share this cache
        try:
            os.replace(private, target)
        except OSError:
            if not target.is_dir():  # refused because another process published the same content: nothing is lost
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)
