"""Which steps are traced, what a trace is named, and that an early end loses none."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from small import flags, make_rows, recipe, save_small_model

from moe_hf.errors import ConfigError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.run import build_trainer, execute
from moe_hf.training.telemetry.profiler import StepProfiler, parse_steps


@pytest.mark.parametrize(("text", "steps"), [("10:13", [10, 11, 12]), ("1:2", [1])])
def test_steps_are_a_range(text, steps):
    assert list(parse_steps(text)) == steps


@pytest.mark.parametrize("text", ["", "10", "10-12", "0:2", "5:5", "7:3", "a:b", "1:2:3", "-1:3", "1.0:2"])
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(ConfigError, match=f"^profile_steps={text} must be FIRST:END .*like 10:13"):
        parse_steps(text)


def train(profiler: StepProfiler, steps: range) -> None:
    """Make one matrix product of its own size in each step, as the Trainer calls its callbacks."""
    control = SimpleNamespace(should_training_stop=False)
    profiler.on_train_begin(None, SimpleNamespace(global_step=steps.start - 1), control)
    for step in steps:
        torch.ones(step, 2) @ torch.ones(2, step)
        control.should_training_stop = step == steps[-1]
        profiler.on_step_end(None, SimpleNamespace(global_step=step), control)
    profiler.on_train_end(None, SimpleNamespace(global_step=steps[-1]), control)


def traced(folder) -> tuple[list[str], list[int]]:
    """Return the names of the steps in a trace, and the numbers of rows of its matrix products."""
    with gzip.open(folder / "profile" / "rank0.json.gz", "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    names = [event["name"] for event in events if event["name"].startswith("ProfilerStep")]
    sizes = [event["args"]["Input Dims"][0][0] for event in events if event["name"] == "aten::mm"]
    return names, sizes


@pytest.mark.parametrize(
    ("asked", "made", "found"),
    [
        (range(3, 5), range(1, 8), [3, 4]),
        (range(1, 3), range(1, 4), [1, 2]),
        (range(4, 5), range(1, 5), [4]),
        # The run ends among them, or is resumed among them.
        (range(3, 9), range(1, 5), [3, 4]),
        (range(3, 9), range(5, 7), [5, 6]),
    ],
)
def test_a_trace_holds_the_steps_asked_for(asked, made, found, tmp_path, capsys):
    train(StepProfiler(asked, str(tmp_path)), made)
    names, sizes = traced(tmp_path)
    assert names == [f"ProfilerStep#{step}" for step in found]
    assert sizes == found
    printed = capsys.readouterr().out
    assert "aten::mm" in printed and "rank0.json.gz" in printed


@pytest.mark.parametrize(("asked", "is_said"), [(range(9, 11), True), (range(2, 4), False)])
def test_steps_that_are_not_made_leave_nothing(asked, is_said, tmp_path, capsys):
    train(StepProfiler(asked, str(tmp_path)), range(6, 9))
    assert not (tmp_path / "profile").exists()
    # A resumed run has traced them before.
    assert ("Nothing was traced: training ended after step 8" in capsys.readouterr().out) == is_said


def words(folder, **changes) -> list[str]:
    """Return a command line of six steps that writes to `out`."""
    save_small_model(folder / "model")
    given = recipe(make_rows(24))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in given.rows))
    paths = {"model_name_or_path": folder / "model", "train_file": rows, "output_dir": folder / "out"}
    return flags(given, 1, **paths, **changes)


@pytest.mark.parametrize(
    ("value", "sentence"), [("3-5", "must be FIRST:END"), ("7:9", "begins after the last step; max_steps is 6")]
)
def test_a_wrong_value_is_found_before_the_run(value, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        build_trainer(words(tmp_path, profile_steps=value), FailureRelay())


def test_an_error_in_a_traced_step_still_writes(tmp_path, no_state_of_earlier_runs, monkeypatch):
    trainer = build_trainer(words(tmp_path, profile_steps="2:6"), FailureRelay())
    compute_loss = trainer.compute_loss

    def fail_in_step_four(*args, **kwargs):
        if trainer.state.global_step == 3:
            raise RuntimeError("the step fails")
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", fail_in_step_four)
    with pytest.raises(RuntimeError, match="the step fails"):
        execute(trainer)
    names, sizes = traced(tmp_path / "out")
    assert names[:2] == ["ProfilerStep#2", "ProfilerStep#3"] and sizes
