"""Argument files and flags of Transformers do in a whole run what they say, or are refused."""

import json
import shutil

import liger_twin
import pytest

from moe_hf.errors import ConfigError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training import speed_arguments
from moe_hf.training.run import train_and_export

pytestmark = pytest.mark.usefixtures("no_state_of_earlier_runs")


@pytest.mark.parametrize("extension", ["yaml", "json"])
def test_all_arguments_from_a_file_and_flags_override_it(lab, tmp_path, extension):
    values = {
        "model_name_or_path": str(lab.folder / "model"),
        "train_file": str(lab.folder / "rows.jsonl"),
        "cache_dir": str(lab.folder / "cache"),
        "output_dir": str(tmp_path / "out"),
        "validation_split_percentage": 0,
        "block_size": 32,
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "do_train": True,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    path = tmp_path / f"arguments.{extension}"
    if extension == "json":
        path.write_text(json.dumps(values | {"learning_rate": 1e-4}))
    else:
        # YAML takes 1e-4 for text.
        path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()) + "learning_rate: 1e-4\n")
    train_and_export([str(path), "--max_steps", "2", "--save_strategy", "no"], FailureRelay())
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry] == [1e-4, 1e-4]
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_resuming_may_be_said_in_a_file(lab, evaluated, tmp_path):
    path = tmp_path / "arguments.yaml"
    path.write_text("resume_from_checkpoint: true\n")
    shutil.copytree(lab.folder / "evaluated" / "checkpoint-3", lab.folder / "continued" / "checkpoint-3")
    lab.train("continued", str(path))
    assert [entry["step"] for entry in lab.steps("continued")] == [1, 2, 3, 4, 5, 6]


def test_ligers_kernels_train_alike(lab, evaluated, monkeypatch):
    """All but the rotation, as the command line says; a twin of Liger stands in for a GPU."""
    liger_twin.install(monkeypatch, **liger_twin.ELEMENTWISE)
    asked = []
    monkeypatch.setattr(speed_arguments, "check_liger", lambda settings, compiles: asked.append(settings))
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, settings: None)
    used = []
    monkeypatch.setattr(liger_twin.LigerRopeFunction, "apply", lambda *args: pytest.fail("rotated"))
    for kind in (liger_twin.LigerRMSNormFunction, liger_twin.LigerSiLUMulFunction):
        monkeypatch.setattr(kind, "apply", lambda *args, kind=kind, run=kind.apply: (used.append(kind), run(*args))[1])
    lab.train("liger", use_liger_kernel=True, liger_kernel_config='{"rope": false}', save_strategy="no")
    assert asked == [{"rope": False}] and len(set(used)) == 2
    losses = [[entry["loss"] for entry in lab.steps(name)] for name in ("liger", "evaluated")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("flag", [{"label_smoothing_factor": 1.0}, {"eval_do_concat_batches": False}])
def test_flags_that_the_losses_cannot_follow_are_refused(lab, flag):
    evaluation = {"do_eval": True, "validation_file": lab.folder / "evaluation.jsonl", "per_device_eval_batch_size": 2}
    with pytest.raises(ConfigError, match=next(iter(flag))):
        lab.train(f"refused_{next(iter(flag))}", max_steps=1, **evaluation, **flag)
