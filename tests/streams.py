"""Streams of documents that can be told apart: each has a number, which its tokens spell."""

import json
from pathlib import Path

import numpy as np
from small import save_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe_hf.data.arguments import DataArguments
from moe_hf.data.documents import StreamSource
from moe_hf.data.encoding import encoder_of
from moe_hf.data.files import load_raw_splits
from moe_hf.data.packing import cutter_of
from moe_hf.data.streaming import StreamOptions, TokenStream

PAD, EOS = 0, 1
# Not w0 to w29: the tokenizer finds its special tokens w0, w1 and w2 inside of these words.
_FIRST_DIGIT, _BASE = 30, 70
BLOCK_SIZE = 8
VOCAB_SIZE = 128


def text_of(number: int) -> str:
    """Spell a number below 4,900 in two words, as often as makes the lengths differ."""
    words = f"w{_FIRST_DIGIT + number // _BASE} w{_FIRST_DIGIT + number % _BASE}"
    return " ".join([words] * (1 + number % 3))


def number_of(tokens) -> int:
    """Return the number of the document that begins a row."""
    return (int(tokens[0]) - _FIRST_DIGIT) * _BASE + int(tokens[1]) - _FIRST_DIGIT


def write_files(folder: Path, counts: list[int], first: int = 0) -> str:
    """Write files of so many documents, numbered from `first`, and return the glob that matches them in order."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, count in enumerate(counts):
        lines = [json.dumps({"text": text_of(number)}) + "\n" for number in range(first, first + count)]
        (folder / f"part{index:02d}.jsonl").write_text("".join(lines))
        first += count
    return f"{folder}/part*.jsonl"


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def source_of(folder: Path, pattern: str, weight: float = 1.0, **flags) -> StreamSource:
    """Open files as a source of a stream; nothing is held out unless told."""
    values = {"train_file": pattern, "streaming": True, "validation_split_percentage": 0, "packing": "pad"}
    data_args = DataArguments(**(values | flags))
    split, _ = load_raw_splits(data_args, do_train=True, do_eval=False)
    encode, _ = encoder_of(
        split, tokenizer(folder / "tokenizer"), data_args, block_size=BLOCK_SIZE, vocab_size=VOCAB_SIZE
    )
    return StreamSource(split, encode, weight, has_pieces=split.is_lines and data_args.packing != "pad")


def stream_of(folder: Path, sources: list[StreamSource], packing: str = "pad", **options) -> TokenStream:
    """Build a stream of sources that `source_of` has opened."""
    cutter = cutter_of(tokenizer(folder / "tokenizer"), DataArguments(packing=packing), BLOCK_SIZE)
    return TokenStream(sources, cutter, StreamOptions(**options))


def plain(row: dict) -> str:
    """Return a row or a batch as text, to compare every number of it."""
    return json.dumps({name: np.asarray(values).tolist() for name, values in sorted(row.items())})
