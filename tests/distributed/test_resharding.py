"""A run goes on where another layout has stopped: other ranks, other experts per rank, another ZeRO stage.

A run of six steps has saved its third on each of several layouts. From there it is finished on others, and must end
where the uninterrupted one ends; what the engine holds before its first own step must be the saved state, bit for bit.
"""

import itertools
import json
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from launching import WORKER, run_cases
from safetensors.torch import load_file, save_file
from small import deepspeed_json, flags, recipe, save_small_model

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint.convert import write_model
from moe_hf.checkpoint.offline import open_exportable
from moe_hf.checkpoint.sharded import ShardedCheckpoint
from moe_hf.parallel.failure import FailureRelay
from moe_hf.training.run import build_trainer, execute

RESHARDING_WORKER = WORKER.with_name("resharding_worker.py")
SAVED_STEP = 3


@dataclass(frozen=True)
class Layout:
    """Processes, ZeRO stage and AutoEP size (`None`: off) of one run, and what its optimizer does with the routers."""

    ranks: int
    zero: int
    ep: int | None
    dtype: str = "fp32"
    routing: str = "softmax"
    routers: str = "shared"

    @property
    def name(self) -> str:
        ep = "off" if self.ep is None else self.ep
        return f"ranks{self.ranks}-zero{self.zero}-ep_{ep}-{self.dtype}-{self.routing}-{self.routers}"


SOURCES = [
    Layout(2, 0, None),
    Layout(2, 1, 2),
    Layout(2, 2, None),
    Layout(2, 3, None),
    Layout(2, 0, None, "bf16"),
    Layout(2, 3, 2, "bf16"),
    Layout(2, 2, 2, routing="sigmoid"),
    Layout(4, 2, 2),
    Layout(4, 3, 2, "bf16"),
    Layout(2, 0, None, "bf16", routers="own"),
    Layout(2, 2, 2, routers="own"),
    Layout(2, 3, None, routers="own"),
    Layout(2, 0, None, routers="frozen"),
    Layout(2, 1, 2, routers="frozen"),
    Layout(2, 2, 2, routing="sigmoid", routers="frozen"),
    Layout(2, 3, 2, routers="frozen"),
    Layout(2, 3, None, "bf16", routers="frozen"),
]

# What others show as well; run with --slow.
SLOW_SOURCES = {
    Layout(2, 0, None, "bf16"),
    Layout(4, 2, 2),
    Layout(4, 3, 2, "bf16"),
    Layout(2, 3, None, routers="own"),
    Layout(2, 1, 2, routers="frozen"),
    Layout(2, 2, 2, routing="sigmoid", routers="frozen"),
    Layout(2, 0, None, "bf16", routers="own"),
    Layout(2, 0, None, routers="frozen"),
    Layout(2, 3, None, "bf16", routers="frozen"),
}

# Every ZeRO stage to another, AutoEP on to off and back, more ranks and fewer, replicas of experts to none.
CROSSINGS = [
    (source, replace(source, ranks=ranks, zero=zero, ep=ep))
    for source, targets in {
        Layout(2, 0, None): [(2, 2, 2), (1, 3, 1)],
        Layout(2, 1, 2): [(2, 0, None), (4, 1, 2)],
        Layout(2, 2, None): [(2, 2, 2), (2, 3, None)],
        Layout(2, 3, None): [(2, 3, 2), (4, 2, 4)],
        Layout(2, 0, None, "bf16"): [(2, 2, 2)],
        Layout(2, 3, 2, "bf16"): [(2, 2, None), (2, 0, None)],
        Layout(2, 2, 2, routing="sigmoid"): [(2, 3, 2), (2, 2, None)],
        Layout(4, 2, 2): [(2, 3, 2), (2, 2, 1)],
        Layout(4, 3, 2, "bf16"): [(2, 3, 2)],
    }.items()
    for ranks, zero, ep in targets
]

# Routers with settings of their own, and frozen ones: on the same layout, on others, and in another group than before.
CROSSINGS += [
    (source, replace(source, **changes))
    for source, changes in [
        (Layout(2, 0, None, "bf16", routers="own"), {"zero": 2, "ep": 2}),
        (Layout(2, 2, 2, routers="own"), {}),
        (Layout(2, 2, 2, routers="own"), {"zero": 3, "ep": None}),
        (Layout(2, 3, None, routers="own"), {"ranks": 1, "zero": 0}),
        (Layout(2, 0, None, routers="frozen"), {"zero": 2, "ep": 2}),
        (Layout(2, 1, 2, routers="frozen"), {}),
        (Layout(2, 1, 2, routers="frozen"), {"zero": 3}),
        (Layout(2, 2, 2, routing="sigmoid", routers="frozen"), {"ranks": 1, "ep": 1}),
        (Layout(2, 3, 2, routers="frozen"), {}),
        (Layout(2, 3, 2, routers="frozen"), {"zero": 2, "ep": None}),
        (Layout(2, 3, None, "bf16", routers="frozen"), {"zero": 0}),
        (Layout(2, 3, None), {"routers": "alike"}),
    ]
]
# The flags of the run that goes on are others than those of the run that stopped: it must not end like it.
CHANGES_OF_FLAGS = [
    (Layout(2, 2, 2, routers="own"), "still"),
    (Layout(2, 2, None), "frozen"),
    (Layout(2, 3, 2, "bf16"), "frozen"),
]

# One run that moves three times: its layouts, and after which step each of them stops.
JOURNEY = [(Layout(4, 2, 4), 2), (Layout(2, 2, 2), 4), (Layout(1, 2, 1), 5), (Layout(4, 2, 2), 6)]

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
LEARNING_RATE = {"fp32": 1e-3, "bf16": 3e-5}
ROUTING = {
    "softmax": {},
    "sigmoid": {"scoring_func": "sigmoid", "router_balancing": "loss_free", "router_bias_update_speed": 0.02},
}
# `alike` is a group of its own with the settings of the others, `still` one with a rate of 0.
ROUTERS = {
    "shared": {},
    "own": {"router_learning_rate_multiplier": 0.3, "router_weight_decay": 0.7},
    "alike": {"router_weight_decay": 0.1},
    "still": {"router_learning_rate_multiplier": 0, "router_weight_decay": 0.7},
    "frozen": {"freeze_router": True},
}


def each(names: str, cases: list) -> pytest.MarkDecorator:
    """Return what runs a test for every source, or crossing that begins there, and for slow ones if asked."""

    def parameter(case: Layout | tuple[Layout, Layout]):
        layouts = case if isinstance(case, tuple) else (case,)
        marks = pytest.mark.slow if layouts[0] in SLOW_SOURCES else ()
        return pytest.param(*layouts, id="-to-".join(layout.name for layout in layouts), marks=marks)

    return pytest.mark.parametrize(names, [parameter(case) for case in cases])


def crossing_name(source: Layout, target: Layout) -> str:
    return f"{source.name}__{target.name}"


def with_flags(source: Layout, routers: str) -> tuple[Layout, Layout]:
    return source, replace(source, routers=routers)


def save_with_other_weights(model: Path, destination: Path) -> Path:
    """Save a model of which nothing may come into a run that resumes: frozen routers alone would not show it."""
    shutil.copytree(model, destination)
    tensors = {name: tensor + 1 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


@pytest.fixture(scope="module")
def lab(request, tmp_path_factory, small_model, rows_file) -> Path:
    """Folder in which every run has left `NAME/checkpoint-N`, and what it logged in `results/NAME`."""
    all_runs = request.config.getoption("--slow")
    skipped = set() if all_runs else SLOW_SOURCES
    folder = tmp_path_factory.mktemp("resharding")
    models = {"softmax": small_model, "sigmoid": folder / "sigmoid_model"}
    save_small_model(models["sigmoid"], **ROUTING["sigmoid"])
    others = {routing: save_with_other_weights(path, folder / f"{routing}_other") for routing, path in models.items()}

    def case(name: str, layout: Layout, **others) -> dict:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(deepspeed_json(layout.zero, layout.ep)))
        words = {
            "model_name_or_path": models[layout.routing],
            "train_file": rows_file,
            "output_dir": folder / name,
            "deepspeed": path,
            "save_strategy": "steps",
            "save_steps": 1,
            "train_sampling_strategy": "random",
        }
        words |= ROUTERS[layout.routers]
        plan = recipe([], learning_rate=LEARNING_RATE[layout.dtype])
        argv = flags(plan, layout.ranks, **(words | others))
        return {"name": name, "argv": [*argv, "--bf16"] if layout.dtype == "bf16" else argv}

    def leg(index: int) -> list[dict]:
        start, step = folder / f"leg{index - 1}", JOURNEY[index - 1][1]
        others = {"resume_from_checkpoint": start / f"checkpoint-{step}"} if index else {}
        return [case(f"leg{index}", JOURNEY[index][0], **others)] if all_runs else []

    def launch(ranks: int, cases: list[dict]) -> None:
        if cases:
            run_cases(ranks, cases, folder / "results", worker=RESHARDING_WORKER)

    def crossings(ranks: int) -> list[dict]:
        return [
            case(
                crossing_name(source, target),
                target,
                resume_from_checkpoint=folder / source.name / f"checkpoint-{SAVED_STEP}",
                model_name_or_path=others[source.routing],
                save_strategy="no",
            )
            for source, target in [*CROSSINGS, *(with_flags(*change) for change in CHANGES_OF_FLAGS)]
            if target.ranks == ranks and source not in skipped
        ]

    # Runs are left to go on to their end, so that each is its own uninterrupted run.
    for ranks in (4, 2):
        chosen = [source for source in SOURCES if source.ranks == ranks and source not in skipped]
        sources = [case(source.name, source, save_steps=SAVED_STEP) for source in chosen]
        launch(ranks, [*leg(0), *sources] if ranks == 4 else sources)
    launch(2, [*leg(1), *crossings(2)])
    launch(1, [*leg(2), *crossings(1)])
    launch(4, [*leg(3), *crossings(4)])
    return folder


def logged(lab: Path, name: str) -> dict[int, dict]:
    """Return what a run has logged for each of its steps."""
    history = json.loads((lab / "results" / name / "result.json").read_text())["log_history"]
    return {entry["step"]: entry for entry in history if "loss" in entry}


LOGGED = ("loss", "grad_norm", "aux_loss", "z_loss")


def assert_same_end(
    lab: Path, name: str, uninterrupted: str, after: int, tolerance: float, keys: tuple[str, ...] = LOGGED
) -> None:
    ours, expected = logged(lab, name), logged(lab, uninterrupted)
    assert sorted(ours) == sorted(expected) == [1, 2, 3, 4, 5, 6]
    for step in range(after + 1, 7):
        for key in keys:
            assert ours[step][key] == pytest.approx(expected[step][key], rel=tolerance, abs=tolerance), (step, key)
        assert ours[step]["learning_rate"] == pytest.approx(expected[step]["learning_rate"], rel=1e-9)
    before, end = (load_file(lab / run / "hf" / "model.safetensors") for run in (uninterrupted, name))
    for key, tensor in before.items():
        assert (tensor.float() - end[key].float()).norm() <= tolerance * tensor.float().norm() + 1e-12, key


def assert_same_state(lab: Path, name: str, source: str, step: int) -> None:
    """What the new engine begins with is what the old one had when it saved, as DeepSpeed's accessors read both."""
    saved, loaded = (torch.load(lab / run / f"state_{step}.pt", weights_only=True) for run in (source, name))
    assert saved.keys() == loaded.keys() == {"fp32", "exp_avg", "exp_avg_sq"}
    for state, tensors in saved.items():
        assert tensors.keys() == loaded[state].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, loaded[state][key]), (state, key)
    assert any(tensor.abs().max() > 0 for tensor in saved["exp_avg_sq"].values())


@each("source", SOURCES)
def test_offline_export_is_the_live_one(lab, source, tmp_path):
    """Every file of it, byte for byte."""
    checkpoint = lab / source.name / f"checkpoint-{SAVED_STEP}"
    write_model(open_exportable(checkpoint), tmp_path / "hf")
    live = {path.name: path.read_bytes() for path in (checkpoint / "hf").iterdir()}
    ours = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert ours.keys() == live.keys()
    for name, content in live.items():
        assert ours[name] == content, name
    _, info = MoEForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@each("source", SOURCES)
def test_reader_gives_what_the_engine_held(lab, source):
    checkpoint = ShardedCheckpoint(lab / source.name / f"checkpoint-{SAVED_STEP}")
    saved = torch.load(lab / source.name / f"state_{SAVED_STEP}.pt", weights_only=True)
    routers = {name for name in checkpoint.shapes if name.endswith(".mlp.gate.weight")}
    assert len(routers) == 2 and checkpoint.frozen == (routers if source.routers == "frozen" else set())
    for state, tensors in saved.items():
        assert tensors.keys() == checkpoint.shapes.keys() - (checkpoint.frozen if state != "fp32" else set())
        for name in tensors:
            assert torch.equal(checkpoint.read(name, state), tensors[name]), (state, name)


@each("source, target", CROSSINGS)
def test_conversion_keeps_every_bit(lab, source, target):
    assert_same_state(lab, crossing_name(source, target), source.name, SAVED_STEP)


@each("source, target", CROSSINGS)
def test_run_ends_like_the_uninterrupted_one(lab, source, target):
    # A balancing loss that is no part of the training is logged of each rank's own tokens.
    keys = LOGGED if source.routing == "softmax" else tuple(key for key in LOGGED if key != "aux_loss")
    assert_same_end(lab, crossing_name(source, target), source.name, SAVED_STEP, TOLERANCE[source.dtype], keys)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(1, len(JOURNEY)))
def test_run_that_moves_three_times(lab, index):
    step = JOURNEY[index - 1][1]
    assert_same_state(lab, f"leg{index}", f"leg{index - 1}", step)
    assert_same_end(lab, f"leg{index}", "leg0", step, TOLERANCE["fp32"])


@pytest.mark.slow
def test_checkpoint_is_converted_once(lab):
    """Two runs went on from it with AutoEP: the first has converted it, and the folder is as old as that."""
    source = Layout(4, 2, 2)
    assert sum(start == source and target.ep is not None for start, target in CROSSINGS) == 2
    folder = lab / source.name / f"checkpoint-{SAVED_STEP}" / "universal_autoep"
    first = lab / crossing_name(source, Layout(2, 3, 2)) / f"state_{SAVED_STEP}.pt"
    assert folder.stat().st_mtime < first.stat().st_mtime


# --------------------------------------------------------------------------------------------------------------------
# Routers with settings of their own


@pytest.fixture(scope="module")
def one_process(lab, small_model, rows_file):
    """Function from what the optimizer does with the routers to what one process without DeepSpeed logs and exports."""

    @cache
    def train(routers: str) -> tuple[dict[int, dict], dict[str, torch.Tensor]]:
        words = {"model_name_or_path": small_model, "train_file": rows_file, "output_dir": lab / f"alone-{routers}"}
        words |= {"train_sampling_strategy": "random", "report_to": "none"} | ROUTERS[routers]
        trainer = build_trainer(flags(recipe([]), 1, **words), FailureRelay())
        execute(trainer)
        steps = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
        return steps, load_file(lab / f"alone-{routers}" / "hf" / "model.safetensors")

    return train


def softmax_sources(*routers: str) -> list[Layout]:
    return [
        layout
        for layout in SOURCES
        if layout.routers in routers and (layout.dtype, layout.routing) == ("fp32", "softmax")
    ]


@each("source", softmax_sources("own", "frozen"))
def test_routers_of_many_processes_are_those_of_one(lab, source, one_process):
    steps, weights = one_process(source.routers)
    ours = logged(lab, source.name)
    assert sorted(ours) == sorted(steps)
    for step, entry in steps.items():
        for key in ("loss", "grad_norm"):
            assert ours[step][key] == pytest.approx(entry[key], rel=1e-6), (step, key)
        assert ours[step]["learning_rate"] == entry["learning_rate"]
    found = load_file(lab / source.name / "hf" / "model.safetensors")
    for name, tensor in weights.items():
        assert (found[name] - tensor).norm() <= 1e-6 * tensor.norm(), name


def test_the_flags_make_a_difference(one_process):
    """Which the comparison with one process would see."""
    (_, shared), (_, own), (_, frozen) = (one_process(routers) for routers in ("shared", "own", "frozen"))
    for first, second in itertools.combinations((shared, own, frozen), 2):
        routers = [name for name in first if name.endswith(".mlp.gate.weight")]
        assert len(routers) == 2
        for name in routers:
            assert (first[name] - second[name]).norm() > 1e-4 * first[name].norm(), name


def routers_of(path: Path) -> dict[str, torch.Tensor]:
    """Return the routers' weights and biases of an export."""
    tensors = load_file(path / "hf" / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if ".mlp.gate." in name}


@each("source", [layout for layout in SOURCES if layout.routers == "frozen"])
def test_frozen_routers_stay_to_the_last_bit(lab, source, small_model):
    model = lab / "sigmoid_model" if source.routing == "sigmoid" else small_model
    start = load_file(model / "model.safetensors")
    end = load_file(lab / source.name / "hf" / "model.safetensors")
    assert start.keys() == end.keys()
    for name, tensor in end.items():
        # Norms begin at 1, where 16 bits are too coarse for their steps.
        if "norm" not in name:
            assert torch.equal(tensor, start[name].to(tensor.dtype)) == (".mlp.gate." in name), name


@pytest.mark.parametrize("change", CHANGES_OF_FLAGS, ids=str)
def test_changed_flags_take_effect_when_resuming(lab, change):
    """Routers stay where they were saved, although the run before has moved them, and everything else goes on."""
    source, target = with_flags(*change)
    saved, name = lab / source.name / f"checkpoint-{SAVED_STEP}", crossing_name(source, target)
    before, after = routers_of(saved), routers_of(lab / name)
    assert before.keys() == after.keys() and len(before) == 2
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
        assert not torch.equal(tensor, routers_of(lab / source.name)[key]), key
    whole_before, whole_after = (load_file(path / "hf" / "model.safetensors") for path in (saved, lab / name))
    for key in whole_before.keys() - before.keys():
        assert "norm" in key or not torch.equal(whole_before[key], whole_after[key]), key
    held_then, held_now = (
        torch.load(lab / run / f"state_{SAVED_STEP}.pt", weights_only=True) for run in (source.name, name)
    )
    for state, tensors in held_now.items():
        missing = set(before) if state != "fp32" and target.routers == "frozen" else set()
        assert tensors.keys() == held_then[state].keys() - missing
        for key, tensor in tensors.items():
            if key in before and target.routers == "frozen":
                tensor, held_then[state][key] = tensor.bfloat16(), held_then[state][key].bfloat16()
            assert torch.equal(tensor, held_then[state][key]), (state, key)
