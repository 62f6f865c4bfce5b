"""A run on tokenized shards is the run on their text, digit for digit, and goes on where it has stopped."""

import json
import random
from pathlib import Path

import pytest
from launching import run_cases
from small import deepspeed_json, flags, recipe
from transformers import AutoTokenizer

from moe_hf.data import tokenizing
from moe_hf.data.arguments import DataArguments

RANKS = 2
STOP = 3
HELD_OUT = {"validation_split_percentage": 20}


@pytest.fixture(scope="module")
def runs(small_model, tmp_path_factory) -> dict[str, dict]:
    """What was logged by a run on text, by one on its tokens, and by one that goes on from the third step of that."""
    folder = tmp_path_factory.mktemp("tokenized")
    text = folder / "text.jsonl"
    draw = random.Random(9)
    texts = [" ".join(f"w{draw.randint(3, 127)}" for _ in range(draw.randint(3, 60))) for _ in range(60)]
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = {"train_file": str(text), "cache_dir": str(folder / "cache"), **HELD_OUT}
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "_ROWS_PER_TASK", 10)
        record = tokenizing.tokenize_to_folder(DataArguments(**source), tokenizer, folder / "tokens", shard_tokens=500)
    assert len(record.splits["train"].shards) > 1
    config = folder / "deepspeed.json"
    config.write_text(json.dumps(deepspeed_json(zero=3, ep=2)))
    tokens = {"tokenized_data": folder / "tokens", "validation_split_percentage": None}
    of_run = {
        "text": source,
        "tokens": tokens,
        "resumed": tokens | {"resume_from_checkpoint": folder / "tokens-run" / f"checkpoint-{STOP}"},
    }
    cases = []
    for name, data in of_run.items():
        values = {
            "model_name_or_path": small_model,
            "output_dir": folder / f"{name}-run",
            "deepspeed": config,
            "packing": "documents",
            "train_sampling_strategy": "random",
            "save_strategy": "steps",
            "save_steps": STOP,
            "do_eval": True,
            **data,
        }
        words = flags(recipe([]), RANKS, **values)
        pairs = zip(words[::2], words[1::2], strict=True)
        cases.append({"name": name, "argv": [word for pair in pairs if pair[1] != "None" for word in pair]})
    run_cases(RANKS, cases, folder / "results")
    return {name: read_result(folder / "results" / name) for name in of_run}


def read_result(folder: Path) -> dict:
    result = json.loads((folder / "result.json").read_text())
    assert result["error"] is None
    return result


def losses(result: dict) -> list[tuple[int, float, float]]:
    return [(log["step"], log["loss"], log["grad_norm"]) for log in result["log_history"] if "loss" in log]


def test_losses_are_those_of_the_text(runs):
    assert len(losses(runs["text"])) == 6 and len({loss for _, loss, _ in losses(runs["text"])}) == 6
    assert losses(runs["tokens"]) == losses(runs["text"])


def test_evaluation_is_that_of_the_text(runs):
    assert runs["tokens"]["metrics"]["eval_loss"] == runs["text"]["metrics"]["eval_loss"]


def test_resumed_run_sees_the_rows_that_come_next(runs):
    after = [logged for logged in losses(runs["tokens"]) if logged[0] > STOP]
    assert len(after) == 3
    assert [logged for logged in losses(runs["resumed"]) if logged[0] > STOP] == after
