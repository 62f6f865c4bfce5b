"""Routers have the learning rate and weight decay that flags give them, or none: AdamW is written out for each weight.

Whole runs in this process, without DeepSpeed; `distributed/test_resharding.py` compares those with it.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import NUM_STEPS, flags, make_rows, recipe, save_small_model, small_config
from transformers import get_scheduler

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.checkpoint.manifest import read_manifest
from moe_hf.checkpoint.topology import Topology, needs_conversion, what_must_stay
from moe_hf.errors import CheckpointError, ConfigError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.router_optimizer import (
    freeze_routers,
    keep_router_settings,
    load_regrouped,
    router_grouping,
    split_router_group,
)
from moe_hf.training.run import build_trainer, execute

RATE, DECAY, EPSILON = 1e-3, 0.1, 1e-5
ROUTERS = ["model.layers.1.mlp.gate.weight", "model.layers.3.mlp.gate.weight"]
LOSS_FREE = {"scoring_func": "sigmoid", "router_balancing": "loss_free", "router_bias_update_speed": 0.02}


@dataclass
class Watched:
    """What a run has done: for each step and parameter the gradient, the weight before and after, and the settings."""

    log: list[dict] = field(default_factory=list)
    steps: list[dict[str, tuple]] = field(default_factory=list)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder with `model`, `loss_free` and `rows.jsonl`, in which runs leave their output."""
    path = tmp_path_factory.mktemp("router_optimizer")
    save_small_model(path / "model")
    save_small_model(path / "loss_free", **LOSS_FREE)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(4 * NUM_STEPS)))
    return path


def command_line(folder: Path, name: str, **changes) -> list[str]:
    words = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "rows.jsonl",
        "cache_dir": folder / "cache",
        "output_dir": folder / name,
        "report_to": "none",
        "overwrite_output_dir": True,
        "use_cpu": True,
    }
    return flags(recipe([]), 1, **(words | changes))


def train(folder: Path, name: str, **changes) -> Watched:
    """Run a command line and watch every step of its optimizer."""
    trainer = build_trainer(command_line(folder, name, **changes), FailureRelay())
    names = {id(param): name for name, param in trainer.model.named_parameters()}
    watched, before = Watched(), {}

    def in_groups(optimizer) -> Iterator[tuple[str, torch.Tensor, dict]]:
        return ((names[id(p)], p, group) for group in optimizer.param_groups for p in group["params"])

    def start(optimizer, args, kwargs) -> None:
        before.update({name: (p.grad.clone(), p.detach().clone()) for name, p, _ in in_groups(optimizer)})

    def end(optimizer, args, kwargs) -> None:
        settings = ("lr", "weight_decay")
        watched.steps.append(
            {
                name: (*before[name], p.detach().clone(), {key: float(group[key]) for key in settings})
                for name, p, group in in_groups(optimizer)
            }
        )

    optimizer = trainer.create_optimizer()
    optimizer.register_step_pre_hook(start)
    optimizer.register_step_post_hook(end)
    execute(trainer)
    watched.log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return watched


class AdamW:
    """One weight's AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, alg. 2), in float64."""

    def __init__(self) -> None:
        self.mean = self.square = torch.zeros((), dtype=torch.float64)
        self.count = 0

    def step(self, weight: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float) -> torch.Tensor:
        weight, gradient = weight.double(), gradient.double()
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.count), self.square / (1 - 0.999**self.count)
        return weight - rate * mean / (square.sqrt() + EPSILON) - rate * decay * weight


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hf" / "model.safetensors")


# --------------------------------------------------------------------------------------------------------------------
# What each flag does


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize(
    ("words", "multiplier", "decay"),
    [
        ({}, 1.0, DECAY),
        ({"router_learning_rate_multiplier": 0.3}, 0.3, DECAY),
        ({"router_learning_rate_multiplier": 4}, 4.0, DECAY),
        ({"router_weight_decay": 0}, 1.0, 0.0),
        ({"router_learning_rate_multiplier": 0.3, "router_weight_decay": 0.7}, 0.3, 0.7),
        ({"router_learning_rate_multiplier": 0}, 0.0, DECAY),
    ],
    ids=str,
)
def test_every_weight_follows_adamw(folder, words, multiplier, decay, optim):
    """Routers with their own settings, all others with the usual ones, at every step of the schedule."""
    watched = train(folder, "run", optim=optim, **words)
    names = {name for name, _ in MoEForCausalLM(small_config()).named_parameters()}
    states = {name: AdamW() for name in names}
    assert len(watched.steps) == len(watched.log) == NUM_STEPS
    for index, step in enumerate(watched.steps):
        rate = RATE * (1 - index / NUM_STEPS)
        assert step.keys() == names
        for name, (gradient, before, after, _) in step.items():
            own = (multiplier * rate, decay) if name in ROUTERS else (rate, 0.0 if "norm" in name else DECAY)
            expected = states[name].step(before, gradient, *own)
            torch.testing.assert_close(after.double(), expected, rtol=0.0, atol=3e-7 * before.abs().max().item())
        for name in ROUTERS:
            assert step[name][0].abs().max() > 0
            assert torch.equal(step[name][1], step[name][2]) == (multiplier == 0)
        # The log tells the rate of the others.
        assert watched.log[index]["learning_rate"] == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("model", ["model", "loss_free"])
def test_frozen_routers_and_their_biases_stay(folder, model):
    watched = train(folder, "frozen", model_name_or_path=folder / model, freeze_router=True)
    assert all(not step.keys() & set(ROUTERS) for step in watched.steps)
    start, end = load_file(folder / model / "model.safetensors"), weights_of(folder / "frozen")
    routers = {name for name in end if name in ROUTERS or name.endswith("e_score_correction_bias")}
    assert len(routers) == (4 if model == "loss_free" else 2)
    for name, tensor in end.items():
        assert torch.equal(tensor, start[name]) == (name in routers), name


def test_the_biases_of_the_same_run_move_unless_it_is_frozen(folder):
    train(folder, "moving", model_name_or_path=folder / "loss_free")
    end = weights_of(folder / "moving")
    assert all(end[name].abs().max() > 0.01 for name in end if name.endswith("e_score_correction_bias"))


@pytest.mark.parametrize("optim", ["adafactor", "sgd", "adagrad", "rmsprop"])
def test_other_optimizers(folder, optim):
    """Two steps, so that a setting that the optimizer itself would not look at shows."""
    words = {"optim": optim, "router_learning_rate_multiplier": 0.25, "router_weight_decay": 0.7, "max_steps": 2}
    for step in train(folder, optim, **words).steps:
        for name, (_, before, after, settings) in step.items():
            ordinary = step["model.embed_tokens.weight"][3]["lr"]
            expected = (0.25 * ordinary, 0.7) if name in ROUTERS else (ordinary, 0.0 if "norm" in name else DECAY)
            assert (settings["lr"], settings["weight_decay"]) == pytest.approx(expected)
            assert not torch.equal(before, after), name
    still = words | {"router_learning_rate_multiplier": 0}
    for step in train(folder, optim, **still).steps:
        for name, (_, before, after, _) in step.items():
            assert torch.equal(before, after) == (name in ROUTERS), name


def test_an_optimizer_without_such_groups_is_refused():
    model = MoEForCausalLM(small_config())
    optimizer = torch.optim.SGD([model.lm_head.weight], lr=0.1)
    with pytest.raises(ConfigError, match=r"^The optimizer SGD does not let routers have their own"):
        split_router_group(optimizer, model, flags_of(router_weight_decay=0.5))


def test_what_is_a_router():
    """Gates of attention, of dense MLPs and of shared experts are not."""
    model = MoEForCausalLM(small_config(attention_gate="elementwise"))
    names = [name for name, _ in model.named_parameters() if "gate" in name]
    assert {name.rpartition("layers.")[2].partition(".")[2] for name in names} > {"mlp.gate.weight"}
    assert any("self_attn" in name for name in names) and any("shared_experts_gate" in name for name in names)
    freeze_routers(model)
    assert [name for name, param in model.named_parameters() if not param.requires_grad] == ROUTERS


# --------------------------------------------------------------------------------------------------------------------
# Schedules

SCHEDULES = {
    "linear": {"num_warmup_steps": 4, "num_training_steps": 20},
    "cosine": {"num_warmup_steps": 5, "num_training_steps": 20},
    "cosine_with_restarts": {"num_warmup_steps": 3, "num_training_steps": 20},
    "cosine_with_min_lr": {
        "num_warmup_steps": 3,
        "num_training_steps": 20,
        "scheduler_specific_kwargs": {"min_lr": 1e-4},
    },
    "polynomial": {"num_warmup_steps": 3, "num_training_steps": 20},
    "inverse_sqrt": {"num_warmup_steps": 3},
    "constant": {},
    "constant_with_warmup": {"num_warmup_steps": 6},
    "warmup_stable_decay": {
        "num_warmup_steps": 4,
        "num_training_steps": 20,
        "scheduler_specific_kwargs": {"num_decay_steps": 8},
    },
    "reduce_lr_on_plateau": {"scheduler_specific_kwargs": {"patience": 1, "factor": 0.37, "min_lr": 1e-4}},
    "greedy": {"scheduler_specific_kwargs": {"patience": 1, "factor": 0.5, "min_lr": 1e-4, "max_lr": 2e-3}},
}


def flags_of(**changes) -> argparse.Namespace:
    values = {"router_learning_rate_multiplier": 1.0, "router_weight_decay": None, "freeze_router": False}
    return argparse.Namespace(**(values | changes))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_multiple_is_kept_at_every_step(name):
    model = MoEForCausalLM(small_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    args = flags_of(router_learning_rate_multiplier=0.3)
    split_router_group(optimizer, model, args)
    scheduler = get_scheduler(name, optimizer, **copy.deepcopy(SCHEDULES[name]))
    keep_router_settings(optimizer, scheduler, args)
    rates = set()
    for step in range(20):
        ordinary, routers = (group["lr"] for group in optimizer.param_groups)
        assert routers == pytest.approx(0.3 * ordinary, rel=1e-12, abs=1e-18)
        rates.add(ordinary)
        optimizer.step()
        measured = name in ("reduce_lr_on_plateau", "greedy")
        scheduler.step(5.0 - step % 7 + step / 10) if measured else scheduler.step()
    assert len(rates) > 2 or name == "constant"


# --------------------------------------------------------------------------------------------------------------------
# Going on with other flags

EVERY_THIRD = {"save_strategy": "steps", "save_steps": 3}
ALIKE = {"router_weight_decay": DECAY}
OWN = {"router_learning_rate_multiplier": 0.3, "router_weight_decay": 0.7}


@pytest.fixture(scope="module")
def stopped(folder) -> Path:
    """Runs that have saved their third step, by what they did with the routers."""
    for name, words in {"shared": {}, "alike": ALIKE, "own": OWN, "frozen": {"freeze_router": True}}.items():
        train(folder, f"first-{name}", **EVERY_THIRD, **words)
    return folder


def go_on(stopped: Path, first: str, name: str, **words) -> Watched:
    checkpoint = stopped / f"first-{first}" / "checkpoint-3"
    return train(stopped, name, resume_from_checkpoint=checkpoint, **words)


@pytest.mark.parametrize(
    ("first", "then"), [("shared", ALIKE), ("alike", {}), ("own", OWN), ("frozen", {"freeze_router": True})], ids=str
)
def test_the_same_settings_in_any_group_end_alike(stopped, first, then):
    """Moments and steps go with their parameters, whichever group these are in: bit for bit."""
    go_on(stopped, first, "resumed", **then)
    uninterrupted, resumed = (weights_of(stopped / name) for name in (f"first-{first}", "resumed"))
    assert uninterrupted.keys() == resumed.keys()
    for name, tensor in uninterrupted.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize("first", ["shared", "own"])
def test_changed_settings_take_effect(stopped, first):
    """Whether or not the routers had a group of their own before; nothing else changes."""
    words = {"router_learning_rate_multiplier": 0.6, "router_weight_decay": 0.2}
    watched = go_on(stopped, first, "changed", **words)
    assert len(watched.steps) == 3
    for index, step in enumerate(watched.steps, start=3):
        rate = RATE * (1 - index / NUM_STEPS)
        for name, (*_, settings) in step.items():
            expected = (0.6 * rate, 0.2) if name in ROUTERS else (rate, 0.0 if "norm" in name else DECAY)
            assert (settings["lr"], settings["weight_decay"]) == pytest.approx(expected, rel=1e-9), name
        assert watched.log[index]["learning_rate"] == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize("first", ["shared", "own"])
def test_routers_are_frozen_in_the_middle(stopped, first):
    watched = go_on(stopped, first, "freezing", freeze_router=True)
    assert all(not step.keys() & set(ROUTERS) for step in watched.steps) and len(watched.steps) == 3
    saved, end = weights_of(stopped / f"first-{first}" / "checkpoint-3"), weights_of(stopped / "freezing")
    for name, tensor in end.items():
        assert torch.equal(tensor, saved[name]) == (name in ROUTERS), name


@pytest.mark.parametrize("words", [{}, OWN], ids=str)
def test_thawed_routers_begin_like_new_ones(stopped, words):
    """Their Adam counts from 1, as that of parameters which it has never seen, while the others go on."""
    watched = go_on(stopped, "frozen", "thawed", **words)
    multiplier, decay = (0.3, 0.7) if words else (1.0, DECAY)
    states = {name: AdamW() for name in ROUTERS}
    for index, step in enumerate(watched.steps, start=3):
        for name in ROUTERS:
            gradient, before, after, _ = step[name]
            rate = multiplier * RATE * (1 - index / NUM_STEPS)
            expected = states[name].step(before, gradient, rate, decay)
            torch.testing.assert_close(after.double(), expected, rtol=0.0, atol=3e-7 * before.abs().max().item())


def test_groups_of_an_unknown_order_are_told(stopped, tmp_path):
    model = MoEForCausalLM(small_config())
    params = list(model.parameters())
    torch.save(torch.optim.AdamW(params).state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError) as caught:
        load_regrouped(torch.optim.AdamW(params), model, tmp_path / "optimizer.pt", "own")
    assert str(caught.value) == (
        f"{tmp_path / 'optimizer.pt'} has optimizer groups of an unknown order; add --reset_optimizer to start from "
        "the weights only."
    )


# --------------------------------------------------------------------------------------------------------------------
# What a checkpoint says of it, and what is refused


def test_checkpoints_say_where_the_routers_were(stopped):
    said = {name: read_manifest(stopped / f"first-{name}" / "checkpoint-3").topology for name in ("shared", "own")}
    said["frozen"] = read_manifest(stopped / "first-frozen" / "checkpoint-3").topology
    assert {name: topology.routers for name, topology in said.items()} == {name: name for name in said}
    assert said["shared"].describe() == "1 processes, no DeepSpeed, EP off, float32"
    assert said["own"].describe().endswith("float32, routers in a group of their own")
    assert said["frozen"].describe().endswith("float32, routers frozen")


def test_under_deepspeed_groups_are_converted_and_thawing_is_refused():
    shared, own, frozen = (Topology(2, 2, 3, "bfloat16", routers) for routers in ("shared", "own", "frozen"))
    assert shared == Topology(2, 2, 3, "bfloat16")  # as older checkpoints have it
    for saved in (shared, own, frozen):
        for now in (shared, own, frozen):
            assert needs_conversion(saved, now) == (saved is not now)
            refused = saved is frozen and now is not frozen
            reason = "--freeze_router must stay, because the checkpoint has no optimizer states of the routers"
            assert what_must_stay(saved, now) == (reason if refused else None)


REFUSED = {
    "--router_weight_decay 0.5 has no effect on routers that --freeze_router takes out of the optimizer.": (
        {"freeze_router": True, "router_weight_decay": 0.5},
        None,
    ),
    "--router_learning_rate_multiplier 2.0 has no effect beside the optimizer section of the DeepSpeed JSON, which "
    "makes one group of all parameters; delete the section and name the optimizer by --optim.": (
        {"router_learning_rate_multiplier": 2.0},
        {"optimizer": {"type": "AdamW"}},
    ),
    "--freeze_router has no effect beside the optimizer section of the DeepSpeed JSON, which makes one group of all "
    "parameters; delete the section and name the optimizer by --optim.": (
        {"freeze_router": True},
        {"optimizer": {"type": "AdamW"}},
    ),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_flags_without_an_effect_are_refused(sentence):
    changes, deepspeed_json = REFUSED[sentence]
    with pytest.raises(ConfigError) as caught:
        router_grouping(flags_of(**changes), small_config(), deepspeed_json)
    assert str(caught.value) == sentence


def test_a_dense_model_has_no_routers():
    dense = MoEConfig(num_experts=0)
    with pytest.raises(ConfigError, match=r"^--freeze_router needs a model with sparse layers, but this one has none"):
        router_grouping(flags_of(freeze_router=True), dense)
    assert router_grouping(flags_of(), dense, {"optimizer": {"type": "AdamW"}}) == "shared"
