"""The learning rate of every step is what the formula of its schedule says, through the flags of run_clm_moe.py."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from small import flags, make_rows, recipe, save_small_model

from moe_hf.errors import ConfigError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.run import build_trainer, execute

RATE, STEPS, WARMUP = 2e-3, 14, 4


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def decayed(step: int) -> float:
    """Share of the steps after the warm-up that have been made."""
    return (step - WARMUP) / (STEPS - WARMUP)


# Flags, and the factor on the learning rate at a step after the warm-up, which all go through linearly.
SCHEDULES: dict[str, tuple[dict, Callable[[int], float]]] = {
    "linear": ({}, lambda step: 1 - decayed(step)),
    "cosine": ({}, lambda step: cosine(decayed(step))),
    "cosine_with_min_lr": ({"min_lr_rate": 0.1}, lambda step: 0.1 + 0.9 * cosine(decayed(step))),
    "inverse_sqrt": ({}, lambda step: (WARMUP / step) ** 0.5),
    "constant_with_warmup": ({}, lambda step: 1.0),
    # Five steps of decay at the end, by default along a cosine. Its warm-up too begins at the minimum.
    "warmup_stable_decay": (
        {"num_decay_steps": 5, "min_lr_ratio": 0.2},
        lambda step: 0.2 + 0.8 * cosine(max(0, step - (STEPS - 5)) / 5),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder with a tiny model and rows."""
    path = tmp_path_factory.mktemp("schedules")
    save_small_model(path / "model", num_hidden_layers=2)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(4 * STEPS)))
    return path


def trainer_of(folder: Path, schedule: str, kwargs: dict | None, **changes):
    words = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "rows.jsonl",
        "cache_dir": folder / "cache",
        "output_dir": folder / "run",
        "overwrite_output_dir": True,
        "report_to": "none",
        "use_cpu": True,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "warmup_steps": WARMUP,
        "lr_scheduler_type": schedule,
    } | changes
    if kwargs is not None:
        words["lr_scheduler_kwargs"] = json.dumps(kwargs)
    return build_trainer(flags(recipe([]), 1, **words), FailureRelay())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_has_the_rate_of_the_formula(folder, no_state_of_earlier_runs, schedule):
    kwargs, factor = SCHEDULES[schedule]
    trainer = trainer_of(folder, schedule, kwargs or None)
    used = []
    create = trainer.create_optimizer

    def watched(*args):
        optimizer = create(*args)
        optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
        return optimizer

    trainer.create_optimizer = watched
    execute(trainer)
    start = kwargs.get("min_lr_ratio", 0)
    warmup = [start + (1 - start) * step / WARMUP for step in range(WARMUP)]
    expected = [RATE * share for share in (*warmup, *map(factor, range(WARMUP, STEPS)))]
    assert used == pytest.approx(expected, rel=1e-9)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "kwargs", "sentence"),
    [
        ("warmup_stable_decay", None, "num_decay_steps"),
        ("cosine_with_min_lr", None, "min_lr"),
        ("cosine_with_min_lr", {"min_rate": 0.1}, "min_rate"),
        ("linear", {"min_lr_rate": 0.1}, "min_lr_rate"),
        ("warmup_stable_decay", {"num_decay_steps": 12}, "num_decay_steps=12"),
    ],
)
def test_wrong_keywords_are_one_sentence_before_anything_starts(folder, schedule, kwargs, sentence):
    with pytest.raises(ConfigError, match=rf"^[^\n]*{sentence}[^\n]*$"):
        trainer_of(folder, schedule, kwargs)
