"""Text, the tokens made of it, and the rows that training gets of either."""

import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_hf.data.arguments import DataArguments
from moe_hf.data.build import build_datasets
from moe_hf.data.tokenizing import tokenize_to_folder

# One token per character, so that everyone can count.
EOS = 0
IDS = {"<eos>": EOS} | {char: i + 1 for i, char in enumerate("abcdefghijklmnopqrstuvwxyz \n")}
VOCAB_SIZE = len(IDS)


def make_tokenizer(ids: dict[str, int] = IDS, **special_tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "<eos>"} | special_tokens))


def make_texts(count: int, longest: int = 40) -> list[str]:
    draw = random.Random(3)
    return ["".join(draw.choices("abcdefghij", k=draw.randint(0, longest))) for _ in range(count)]


class Lab:
    """A folder with text, the tokens made of it, and the rows that training gets of either."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.tokens = folder / "tokens"

    def write(self, texts: list[str], name: str = "text.jsonl") -> Path:
        path = self.folder / name
        as_lines = name.endswith(".txt")
        path.write_text("".join(f"{text}\n" if as_lines else json.dumps({"text": text}) + "\n" for text in texts))
        return path

    def source(self, file: Path, **flags) -> DataArguments:
        values = {"train_file": str(file), "cache_dir": str(self.folder / "cache"), "validation_split_percentage": 0}
        return DataArguments(**(values | flags))

    def tokenize(self, file: Path, shard_tokens: int = 200, num_proc: int = 1, overwrite: bool = True, **flags):
        return tokenize_to_folder(
            self.source(file, **flags),
            self.tokenizer,
            self.tokens,
            shard_tokens=shard_tokens,
            num_proc=num_proc,
            overwrite=overwrite,
        )

    def open(self, block_size: int, use=None, vocab_size: int = VOCAB_SIZE, do_eval: bool = False, **flags):
        return build_datasets(
            DataArguments(tokenized_data=str(self.tokens), **flags),
            use or self.tokenizer,
            block_size=block_size,
            vocab_size=vocab_size,
            do_train=True,
            do_eval=do_eval,
        )

    def pack(self, file: Path, block_size: int, do_eval: bool = False, **flags):
        return build_datasets(
            self.source(file, **flags),
            self.tokenizer,
            block_size=block_size,
            vocab_size=VOCAB_SIZE,
            do_train=True,
            do_eval=do_eval,
        )


def as_lists(rows) -> list[dict]:
    """Return all rows with plain integers, after a look at their types."""
    listed = []
    for index in range(len(rows)):
        row = rows[index]
        assert all(np.asarray(values).dtype == np.int64 for values in row.values())
        listed.append({name: list(map(int, values)) for name, values in row.items()})
    return listed
