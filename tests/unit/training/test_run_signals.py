"""A signal ends a run after its step, with a checkpoint from which it goes on as if there had been none."""

import json
import os
import signal

import pytest
from accelerate.state import AcceleratorState
from run_lab import is_identical
from transformers import TrainerCallback

from moe_hf.checkpoint.manifest import is_whole
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.preemption import Preempted
from moe_hf.training.run import build_trainer, execute

pytestmark = pytest.mark.usefixtures("no_state_of_earlier_runs")


class Signal(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: int) -> None:
        self._step, self._number = step, number

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self._step - 1:
            os.kill(os.getpid(), self._number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_after_the_step_and_the_run_goes_on(lab, number):
    """Also between an evaluation that was left out and one that was made: dropout is the same."""
    changes = {"config_overrides": "attention_dropout=0.1", "save_strategy": "no", "save_only_model": True}
    evaluation = {"validation_file": lab.folder / "evaluation.jsonl", "eval_strategy": "steps", "eval_steps": 2}
    name = signal.Signals(number).name
    if not (lab.folder / "not_evaluated").exists():
        lab.train("not_evaluated", **changes)
        AcceleratorState._reset_state(reset_partial_state=True)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    trainer = build_trainer(lab.words(name, resume_from_checkpoint="auto", **changes, **evaluation), FailureRelay())
    trainer.add_callback(Signal(4, number))
    try:
        with pytest.raises(Preempted, match=rf"Stopped by {name} after step 4; .*/checkpoint-4\. Go on with"):
            execute(trainer)
    finally:
        for each, handler in zip((signal.SIGTERM, signal.SIGUSR1), handlers, strict=True):
            signal.signal(each, handler)
    log = (lab.folder / name / "metrics.jsonl").read_text()
    assert log.count("eval_loss") == 1  # of step 2
    assert [path.name for path in (lab.folder / name).glob("checkpoint-*")] == ["checkpoint-4"]
    assert is_whole(lab.folder / name / "checkpoint-4")

    AcceleratorState._reset_state(reset_partial_state=True)
    lab.train(name, resume_from_checkpoint="auto", **changes, **evaluation)
    lines = [json.loads(line) for line in (lab.folder / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert is_identical(lab.weights(f"{name}/hf"), lab.weights("not_evaluated/hf"))
    # A run that ends by itself leaves signals as they were.
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == handlers
