"""A run goes on where another layout has stopped: other ranks, other experts per rank, another ZeRO stage.

A run of six steps has saved its third on each of several layouts. From there it is finished on others, and must end
where the uninterrupted one ends; what the engine holds before its first own step must be the saved state, bit for bit.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from launching import WORKER, run_cases
from safetensors.torch import load_file
from small import deepspeed_json, flags, recipe, save_small_model

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint.convert import write_model
from moe_hf.checkpoint.offline import open_exportable
from moe_hf.checkpoint.sharded import ShardedCheckpoint

RESHARDING_WORKER = WORKER.with_name("resharding_worker.py")
SAVED_STEP = 3


@dataclass(frozen=True)
class Layout:
    """Processes, ZeRO stage and AutoEP size (`None`: off) of one run."""

    ranks: int
    zero: int
    ep: int | None
    dtype: str = "fp32"
    routing: str = "softmax"

    @property
    def name(self) -> str:
        ep = "off" if self.ep is None else self.ep
        return f"ranks{self.ranks}-zero{self.zero}-ep_{ep}-{self.dtype}-{self.routing}"


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
]

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

# One run that moves three times: its layouts, and after which step each of them stops.
JOURNEY = [(Layout(4, 2, 4), 2), (Layout(2, 2, 2), 4), (Layout(1, 2, 1), 5), (Layout(4, 2, 2), 6)]

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
LEARNING_RATE = {"fp32": 1e-3, "bf16": 3e-5}
ROUTING = {
    "softmax": {},
    "sigmoid": {"scoring_func": "sigmoid", "router_balancing": "loss_free", "router_bias_update_speed": 0.02},
}


def crossing_name(source: Layout, target: Layout) -> str:
    return f"{source.name}__{target.name}"


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_model, rows_file) -> Path:
    """Folder in which every run has left `NAME/checkpoint-N`, and what it logged in `results/NAME`."""
    folder = tmp_path_factory.mktemp("resharding")
    models = {"softmax": small_model, "sigmoid": folder / "sigmoid_model"}
    save_small_model(models["sigmoid"], **ROUTING["sigmoid"])

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
        plan = recipe([], learning_rate=LEARNING_RATE[layout.dtype])
        argv = flags(plan, layout.ranks, **(words | others))
        return {"name": name, "argv": [*argv, "--bf16"] if layout.dtype == "bf16" else argv}

    def leg(index: int) -> dict:
        start, step = folder / f"leg{index - 1}", JOURNEY[index - 1][1]
        others = {"resume_from_checkpoint": start / f"checkpoint-{step}"} if index else {}
        return case(f"leg{index}", JOURNEY[index][0], **others)

    def launch(ranks: int, cases: list[dict]) -> None:
        run_cases(ranks, cases, folder / "results", worker=RESHARDING_WORKER)

    def crossings(ranks: int) -> list[dict]:
        return [
            case(
                crossing_name(source, target),
                target,
                resume_from_checkpoint=folder / source.name / f"checkpoint-{SAVED_STEP}",
                save_strategy="no",
            )
            for source, target in CROSSINGS
            if target.ranks == ranks
        ]

    # Runs are left to go on to their end, so that each is its own uninterrupted run.
    for ranks in (4, 2):
        sources = [case(source.name, source, save_steps=SAVED_STEP) for source in SOURCES if source.ranks == ranks]
        launch(ranks, [leg(0), *sources] if ranks == 4 else sources)
    launch(2, [leg(1), *crossings(2)])
    launch(1, [leg(2), *crossings(1)])
    launch(4, [leg(3), *crossings(4)])
    return folder


def logged(lab: Path, name: str) -> dict[int, dict]:
    """Return what a run has logged for each of its steps."""
    history = json.loads((lab / "results" / name / "result.json").read_text())["log_history"]
    return {entry["step"]: entry for entry in history if "loss" in entry}


def assert_same_end(lab: Path, name: str, uninterrupted: str, after: int, tolerance: float) -> None:
    ours, expected = logged(lab, name), logged(lab, uninterrupted)
    assert sorted(ours) == sorted(expected) == [1, 2, 3, 4, 5, 6]
    for step in range(after + 1, 7):
        for key in ("loss", "grad_norm", "aux_loss", "z_loss"):
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


@pytest.mark.parametrize("source", SOURCES, ids=lambda layout: layout.name)
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


@pytest.mark.parametrize("source", SOURCES, ids=lambda layout: layout.name)
def test_reader_gives_what_the_engine_held(lab, source):
    checkpoint = ShardedCheckpoint(lab / source.name / f"checkpoint-{SAVED_STEP}")
    saved = torch.load(lab / source.name / f"state_{SAVED_STEP}.pt", weights_only=True)
    for state, tensors in saved.items():
        assert checkpoint.shapes.keys() == tensors.keys()
        for name in tensors:
            assert torch.equal(checkpoint.read(name, state), tensors[name]), (state, name)


@pytest.mark.parametrize(("source", "target"), CROSSINGS, ids=lambda layout: layout.name)
def test_conversion_keeps_every_bit(lab, source, target):
    assert_same_state(lab, crossing_name(source, target), source.name, SAVED_STEP)


@pytest.mark.parametrize(("source", "target"), CROSSINGS, ids=lambda layout: layout.name)
def test_run_ends_like_the_uninterrupted_one(lab, source, target):
    assert_same_end(lab, crossing_name(source, target), source.name, SAVED_STEP, TOLERANCE[source.dtype])


@pytest.mark.parametrize("index", range(1, len(JOURNEY)))
def test_run_that_moves_three_times(lab, index):
    step = JOURNEY[index - 1][1]
    assert_same_state(lab, f"leg{index}", f"leg{index - 1}", step)
    assert_same_end(lab, f"leg{index}", "leg0", step, TOLERANCE["fp32"])


def test_checkpoint_is_converted_once(lab):
    """Two runs went on from it with AutoEP: the first has converted it, and the folder is as old as that."""
    source = Layout(4, 2, 2)
    assert sum(start == source and target.ep is not None for start, target in CROSSINGS) == 2
    folder = lab / source.name / f"checkpoint-{SAVED_STEP}" / "universal_autoep"
    first = lab / crossing_name(source, Layout(2, 3, 2)) / f"state_{SAVED_STEP}.pt"
    assert folder.stat().st_mtime < first.stat().st_mtime
