"""Steps that are not finite change no weight, are counted, also after resuming, and too many of them end the run."""

import json
import math
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from run_lab import is_identical
from small import GLOBAL_MICRO_BATCH, make_rows, save_small_model

from moe_hf import MoEForCausalLM
from moe_hf.training.trainer import TrainingStopped

POISON = 99  # a token whose embedding is NaN

pytestmark = pytest.mark.usefixtures("no_state_of_earlier_runs")


@pytest.fixture(scope="module")
def poisoned(lab, rows) -> dict[str, Path]:
    """Flags of a run in which one token's embedding is NaN, and rows that have it in the third step."""
    save_small_model(lab.folder / "poisoned")
    model = MoEForCausalLM.from_pretrained(lab.folder / "poisoned")
    model.model.embed_tokens.weight.data[POISON] = math.nan
    model.save_pretrained(lab.folder / "poisoned")
    clean = [{key: [3 if v == POISON else v for v in values] for key, values in row.items()} for row in rows]
    clean[2 * GLOBAL_MICRO_BATCH + 1]["input_ids"][0] = POISON
    once = lab.write_rows("once.jsonl", clean)
    return {"model_name_or_path": lab.folder / "poisoned", "train_file": once}


@pytest.fixture(scope="module")
def skipping(lab, poisoned) -> Path:
    """Folder of a run whose third step is not finite, with a checkpoint of every step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    lab.train("skipping", **poisoned, save_strategy="steps", save_steps=1)
    return lab.folder / "skipping"


def test_a_step_with_nan_is_skipped_and_counted(lab, skipping):
    steps = lab.steps("skipping")
    assert [entry["skipped_steps"] for entry in steps] == [0, 0, 1, 1, 1, 1]
    assert [math.isfinite(entry["loss"]) for entry in steps] == [True, True, False, True, True, True]
    before, skipped, after = (lab.weights(f"skipping/checkpoint-{n}/hf") for n in (2, 3, 4))
    assert is_identical(before, skipped)
    assert not is_identical(skipped, after)
    poison = lab.weights("skipping/hf").pop("model.embed_tokens.weight")
    assert poison.isfinite().all(dim=1).sum() == len(poison) - 1


def test_skipped_steps_are_counted_on_after_resuming(lab, poisoned, skipping):
    shutil.copytree(skipping / "checkpoint-4", lab.folder / "skipping_on" / "checkpoint-4")
    lab.train("skipping_on", **poisoned, resume_from_checkpoint=True)
    assert [entry["skipped_steps"] for entry in lab.steps("skipping_on")] == [0, 0, 1, 1, 1, 1]


def test_what_is_not_finite_is_null_in_the_metrics_file(skipping):
    lines = (skipping / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line, parse_constant=pytest.fail)["loss"] for line in lines if '"loss"' in line]
    assert [loss is None for loss in losses] == [False, False, True, False, False, False]


def test_steps_skipped_in_a_row_are_counted_on_after_resuming(lab, poisoned):
    always = [row | {"input_ids": [POISON, *row["input_ids"][1:]]} for row in make_rows(24)]
    changes = poisoned | {"train_file": lab.write_rows("always.jsonl", always), "max_skipped_steps": 3}
    lab.train("in_a_row", **changes, max_steps=2, save_strategy="steps", save_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(TrainingStopped, match=r"3 steps in a row .* \(step 3, max_skipped_steps=3\)"):
        lab.train("in_a_row", **changes, resume_from_checkpoint=True)


def test_too_many_skipped_steps_stop_the_run_with_a_checkpoint(lab, poisoned):
    always = [row | {"input_ids": [POISON, *row["input_ids"][1:]]} for row in make_rows(24)]
    changes = poisoned | {"train_file": lab.write_rows("always.jsonl", always)}
    with pytest.raises(TrainingStopped, match=r"2 steps in a row .*max_skipped_steps=2.*checkpoint-2\."):
        lab.train("stopped", **changes, max_skipped_steps=2)
    assert (lab.folder / "stopped" / "checkpoint-2" / "manifest.json").is_file()
    assert not (lab.folder / "stopped" / "hf").exists()
