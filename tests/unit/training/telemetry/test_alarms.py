"""Each alarm in a whole run that has the trouble, and none in the same run without it."""

import json
import logging
from pathlib import Path

import pytest
import torch
from small import flags, make_rows, recipe, save_small_model

from moe_hf import MoEForCausalLM
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.run import train_and_export
from moe_hf.training.trainer import TrainingStopped


def no_trouble(model: MoEForCausalLM) -> None:
    """A router whose two favourites every token points to; the loads are unequal, and all experts get some."""


def two_experts_get_all(model: MoEForCausalLM) -> None:
    model.model.layers[3].mlp.gate.e_score_correction_bias[:2] = 9.0


def one_expert_gets_nothing(model: MoEForCausalLM) -> None:
    model.model.layers[1].mlp.gate.e_score_correction_bias[2] = -9.0


def large_router_weights(model: MoEForCausalLM) -> None:
    model.model.layers[3].mlp.gate.weight *= 200.0


def nan_after_the_last_layer(model: MoEForCausalLM) -> None:
    model.model.norm.weight[0] = torch.nan


TROUBLES = {
    no_trouble: [],
    two_experts_get_all: ["model.layers.3.mlp: few of 4 experts", "model.layers.3.mlp: 2 of 4 experts"],
    one_expert_gets_nothing: ["model.layers.1.mlp: 1 of 4 experts got no token"],
    large_router_weights: ["model.layers.3.mlp"],
    nan_after_the_last_layer: ["the loss is nan"],
}


pytestmark = pytest.mark.usefixtures("no_state_of_earlier_runs")


@pytest.fixture
def warnings(caplog):
    """Function that returns what the watchdog has said."""
    library = logging.getLogger("transformers")
    own = logging.getLogger("moe_hf")
    before = library.propagate, own.propagate
    library.propagate = own.propagate = True
    yield lambda: [record.getMessage() for record in caplog.records if "watchdog" in record.pathname]
    library.propagate, own.propagate = before


def train(folder: Path, trouble, **changes) -> None:
    save_small_model(folder / "model", router_balancing="loss_free", router_bias_update_speed=0.0)
    model = MoEForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        trouble(model)
    model.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(24)))
    values = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "rows.jsonl",
        "cache_dir": folder / "cache",
        "output_dir": folder / "run",
        "use_cpu": True,
        "dead_expert_steps": 3,
        "max_skipped_steps": 99,
    }
    train_and_export(flags(recipe([], 1, learning_rate=0.0), 1, **(values | changes)), FailureRelay())


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.__name__)
def test_a_run_warns_of_its_trouble_and_of_nothing_else(tmp_path, warnings, trouble):
    train(tmp_path, trouble)
    said, expected = warnings(), TROUBLES[trouble]
    assert len(said) == len(expected), said
    for text in expected:
        assert sum(text in warning for warning in said) == 1, said


def test_a_collapse_ends_the_run_with_a_checkpoint_if_asked(tmp_path):
    with pytest.raises(TrainingStopped, match=r"model\.layers\.3\.mlp.*checkpoint-3"):
        train(tmp_path, two_experts_get_all, stop_on_router_collapse=True)
    assert (tmp_path / "run" / "checkpoint-3" / "manifest.json").is_file()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 3


def test_a_healthy_run_is_not_ended(tmp_path):
    train(tmp_path, no_trouble, stop_on_router_collapse=True)
    assert (tmp_path / "run" / "hf").is_dir()
