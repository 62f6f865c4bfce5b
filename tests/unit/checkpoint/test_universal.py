"""A conversion is what DeepSpeed's own converter writes, and what it does not: other layouts, other names, ZeRO 0."""

import argparse
import contextlib
import io
import weakref
from pathlib import Path

import pytest
import torch
from deepspeed.checkpoint import constants, ds_to_universal
from deepspeed_files import (
    MOMENTS,
    STATES,
    STEP,
    Run,
    correction_biases,
    draw_states,
    live_model,
    loss_free,
    odd_config,
    on_rank,
    write_checkpoint,
)

from moe_hf.checkpoint import folders, universal
from moe_hf.checkpoint.sharded import ShardedCheckpoint
from moe_hf.checkpoint.universal import BUFFERS_NAME, TAG, universal_folder, write_universal
from moe_hf.errors import CheckpointError

RUNS = [Run(ranks, zero, ep, ep == 2) for zero in (1, 2, 3) for ranks, ep in ((2, None), (2, 1), (4, 2), (4, 4))]
ALL_RUNS = [Run(2, 0), Run(2, 0, bf16=True), *RUNS, Run(4, 3, 2, sub_group_size=40)]


def convert(source: Path, destination: Path, expert_parallel: bool) -> Path:
    """Convert, and return the folder whose `zero/` holds a folder for each parameter."""
    write_universal(ShardedCheckpoint(source), destination, expert_parallel=expert_parallel)
    return destination / TAG


def convert_with_deepspeed(source: Path, destination: Path, run: Run) -> Path:
    arguments = argparse.Namespace(
        input_folder=str(source / f"global_step{STEP}"),
        output_folder=str(destination / "step"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=run.ep is None,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
    return destination / "step"


def files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted((folder / "zero").rglob("*.pt"))}


def loaded(path: Path) -> dict:
    """Read a file of DeepSpeed's or ours; at ZeRO 3 its converter leaves bare, flat tensors."""
    content = torch.load(path, weights_only=False)
    return content if isinstance(content, dict) else {"param": content}


@pytest.mark.parametrize(
    ("kind", "run"),
    [("plain", run) for run in RUNS] + [("tied, biased", run) for run in (Run(2, 1, 2), Run(2, 2), Run(2, 3, 2))],
    ids=str,
)
def test_what_deepspeeds_converter_writes(tmp_path, kind, run):
    make = odd_config if kind == "plain" else loss_free
    config = make(num_hidden_layers=2, tie_word_embeddings=kind != "plain")
    model = live_model(config)
    source = write_checkpoint(tmp_path / "checkpoint-3", run, model, draw_states(model))
    ours = files(convert(source, tmp_path / "ours", run.ep is not None))
    theirs = files(convert_with_deepspeed(source, tmp_path / "theirs", run))
    if run.zero < 3:
        # It copies whatever else the model's state holds as if it were trained, in the dtype of training.
        for name in ("lm_head.weight", *on_rank(correction_biases(model), run, 0)):
            if config.tie_word_embeddings:
                assert theirs.pop(f"zero/{name}/fp32.pt")
        assert ours.keys() == theirs.keys()
    else:
        # The step of ZeRO 3 is in the common state alone; the loader takes it from there.
        steps = {name for name in ours if name.endswith("/step.pt")}
        assert ours.keys() - steps == theirs.keys()
    for name, path in theirs.items():
        if name == "zero/optimizer_state.pt":
            continue
        if name.endswith("step.pt"):
            assert torch.load(ours[name]) == torch.load(path) == STEP
            continue
        mine, other = loaded(ours[name]), loaded(path)
        assert mine["param"].dtype == other["param"].dtype == torch.float32
        assert torch.equal(mine["param"].flatten(), other["param"].flatten()), name
        if run.zero < 3 or (run.ep is not None and ".experts." in name):
            assert mine["param"].shape == other["param"].shape and mine.keys() == other.keys(), name
            assert all(mine[key] == other[key] for key in mine if key != "param")


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize(
    "run", [pytest.param(run, id=run.name, marks=[pytest.mark.slow] * (i % 3 > 0)) for i, run in enumerate(ALL_RUNS)]
)
def test_every_layout_gives_the_same_conversion(tmp_path, run, expert_parallel):
    """The names are those of the engine that resumes, whatever the layout that was saved."""
    model = live_model(loss_free(num_hidden_layers=2))
    states = draw_states(model)
    source = write_checkpoint(tmp_path / "checkpoint-3", run, model, states)
    folder = convert(source, tmp_path / "out", expert_parallel)
    one = Run(1, 1, 1 if expert_parallel else None)
    expected = {state: on_rank(states[state], one, 0) for state in STATES}
    assert sorted(path.name for path in (folder / "zero").iterdir() if path.is_dir()) == sorted(expected["fp32"])
    for name, weight in expected["fp32"].items():
        assert torch.load(folder / "zero" / name / "step.pt") == run.counted_steps
        assert sorted(path.stem for path in (folder / "zero" / name).iterdir()) == sorted([*STATES, "step"])
        is_expert = expert_parallel and ".experts." in name
        for state in STATES:
            record = torch.load(folder / "zero" / name / f"{state}.pt")
            assert record.keys() == (
                {"param", "cat_dim"} | ({"is_expert_param", "ep_num_experts"} if is_expert else set())
            )
            assert record["param"].dtype == torch.float32 and torch.equal(record["param"], expected[state][name])
            assert record["param"].shape == weight.shape and record["cat_dim"] == 0
            if is_expert:
                assert record["is_expert_param"] is True and record["ep_num_experts"] == 4
    buffers = torch.load(folder / BUFFERS_NAME)
    biases = on_rank(correction_biases(model), one, 0)
    assert buffers.keys() == biases.keys() and len(biases) == 1
    assert all(
        torch.equal(buffers[name], bias) and buffers[name].dtype == torch.float32 for name, bias in biases.items()
    )


def test_the_keys_are_deepspeeds(tmp_path):
    model = live_model(odd_config(num_hidden_layers=2))
    source = write_checkpoint(tmp_path / "checkpoint-3", Run(2, 2), model, draw_states(model))
    folder = convert(source, tmp_path / "out", True)
    record = torch.load(folder / "zero" / "model.layers.1.mlp.experts.w1" / "exp_avg.pt")
    assert record.keys() == {
        constants.PARAM,
        constants.CAT_DIM,
        constants.EP_IS_EXPERT_PARAM,
        constants.EP_NUM_EXPERTS,
    }
    assert {f"{constants.FP32_WEIGHT_KEY}.pt", "exp_avg.pt", "exp_avg_sq.pt", "step.pt"} == {
        path.name for path in (folder / "zero" / "model.norm.weight").iterdir()
    }
    common = torch.load(folder / "zero" / "optimizer_state.pt")
    assert {constants.PARAM_GROUPS, constants.OPTIMIZER_STATE_DICT, constants.DS_VERSION} == common.keys()
    # With settings of their own, the saved groups would replace the engine's: none has any.
    groups = [*common[constants.PARAM_GROUPS], *common[constants.OPTIMIZER_STATE_DICT][constants.PARAM_GROUPS]]
    assert len(common[constants.PARAM_GROUPS]) > 1000 and not any(groups)
    assert common[constants.OPTIMIZER_STATE_DICT]["state"] == {0: {"step": torch.tensor(3.0)}}
    assert (folder.parent / "latest_universal").read_text() == folder.name


@pytest.mark.parametrize("run", [Run(2, 0), Run(4, 3, 2)], ids=lambda run: run.name)
def test_the_counters_go_along(tmp_path, run):
    model = live_model(odd_config(num_hidden_layers=2))
    source = write_checkpoint(tmp_path / "checkpoint-3", run, model, draw_states(model))
    folder = convert(source, tmp_path / "out", False)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        state = torch.load(folder / name)
        counters = {key: state[key] for key in ("global_steps", "global_samples", "skipped_steps")}
        assert counters == {"global_steps": 3, "global_samples": 12, "skipped_steps": 1}
        assert (state["dp_world_size"], state["mp_world_size"]) == (run.ranks, 1)
        assert state["module"] == {} and state["lr_scheduler"] is None


def test_each_name_is_told_once_before_it_is_read(tmp_path):
    model = live_model(loss_free(num_hidden_layers=2))
    checkpoint = ShardedCheckpoint(write_checkpoint(tmp_path / "c", Run(2, 2, 2), model, draw_states(model)))
    told, read = [], checkpoint.read

    def watched(name, state):
        assert told[-1] == name
        return read(name, state)

    checkpoint.read = watched
    write_universal(checkpoint, tmp_path / "out", expert_parallel=True, on_tensor=told.append)
    assert sorted(told) == sorted(name for name, _ in model.named_parameters())


# --------------------------------------------------------------------------------------------------------------------
# Whole or not there


@pytest.fixture
def checkpoint(tmp_path):
    model = live_model(odd_config(num_hidden_layers=2))
    return ShardedCheckpoint(write_checkpoint(tmp_path / "checkpoint-3", Run(2, 2), model, draw_states(model)))


def test_where_it_goes(tmp_path):
    assert universal_folder(tmp_path, True).name == "universal_autoep"
    assert universal_folder(tmp_path, False).name == "universal"


@pytest.mark.parametrize("fails", ["read", "write", "global state", "rename"])
def test_an_error_in_the_middle_leaves_nothing_in_place(tmp_path, checkpoint, monkeypatch, fails):
    destination = universal_folder(checkpoint.path, False)
    calls = []

    def broken(function, error):
        def call(*arguments, **keywords):
            calls.append(1)
            if len(calls) == (1 if fails in ("global state", "rename") else 20):
                raise error
            return function(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        match fails:
            case "read":
                patch.setattr(checkpoint, "read", broken(checkpoint.read, CheckpointError("damaged.")))
            case "write":
                patch.setattr(torch, "save", broken(torch.save, OSError(28, "No space left on device")))
            case "global state":
                patch.setattr(universal, "_write_global_state", broken(universal._write_global_state, OSError(28, "")))
            case "rename":
                patch.setattr(folders, "put_in_place", broken(folders.put_in_place, OSError(28, "")))
        with pytest.raises((CheckpointError, OSError)):
            write_universal(checkpoint, destination, expert_parallel=False)
    assert calls and not destination.exists()
    # Nor does what a killed attempt has left find its way into the next.
    (folders.incomplete_name(destination) / TAG / "zero" / "stale").mkdir(parents=True)
    write_universal(checkpoint, destination, expert_parallel=False)
    assert not (destination / TAG / "zero" / "stale").exists()
    names = {path.name for path in (destination / TAG / "zero").iterdir()}
    assert names == {*checkpoint.shapes, "optimizer_state.pt"}
    assert not [path.name for path in checkpoint.path.iterdir() if path.name.startswith(".")]


def test_one_that_is_there_is_replaced(tmp_path, checkpoint):
    destination = tmp_path / "universal"
    (destination / TAG).mkdir(parents=True)
    (destination / TAG / "old").touch()
    write_universal(checkpoint, destination, expert_parallel=False)
    assert not (destination / TAG / "old").exists() and (destination / TAG / "zero").is_dir()


def test_tensors_are_not_kept(tmp_path, checkpoint, monkeypatch):
    """What was read two tensors ago is gone."""
    living, read = [], checkpoint.read

    def watched(name, state):
        assert sum(reference() is not None for reference in living) <= 1
        tensor = read(name, state)
        living.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(checkpoint, "read", watched)
    write_universal(checkpoint, tmp_path / "out", expert_parallel=True)
    assert len(living) == len(checkpoint.shapes) * (1 + len(MOMENTS))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "add"])
def test_a_damaged_conversion_is_not_taken_for_whole(checkpoint, damage):
    folder = universal_folder(checkpoint.path, False)
    assert not universal.is_intact(folder)
    write_universal(checkpoint, folder, expert_parallel=False)
    assert universal.is_intact(folder)
    path = folder / TAG / "zero" / "lm_head.weight" / "exp_avg.pt"
    content = path.read_bytes()
    match damage:
        case "flip":
            path.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
        case "cut":
            path.write_bytes(content[:-1])
        case "remove":
            path.unlink()
        case "add":
            path.with_name("exp_avg_extra.pt").write_bytes(content)
    assert not universal.is_intact(folder)
    write_universal(checkpoint, folder, expert_parallel=False)
    assert universal.is_intact(folder)
