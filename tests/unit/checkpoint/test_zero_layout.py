"""Files that are missing, cut, of another stage or optimizer are told; few of their pages stay mapped."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepspeed_files import STATES, STEP, Run, draw_states, live_model, loss_free, write_checkpoint

from moe_hf.checkpoint import zero_layout
from moe_hf.checkpoint.manifest import Progress, write_manifest
from moe_hf.checkpoint.sharded import ShardedCheckpoint
from moe_hf.checkpoint.topology import Topology
from moe_hf.errors import CheckpointError

RUNS = [Run(2, 0), Run(2, 0, bf16=True), Run(2, 1), Run(4, 2, 2, bf16=True), Run(2, 3), Run(4, 3, 2, bf16=True)]
EVERY_RUN = pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)


@pytest.fixture
def model():
    return live_model(loss_free())


@pytest.fixture
def saved(tmp_path, model) -> Callable[[Run], Path]:
    """Return a function that writes a checkpoint and returns the folder of its shards."""

    def save(run: Run) -> Path:
        return write_checkpoint(tmp_path / "checkpoint-3", run, model, draw_states(model)) / f"global_step{STEP}"

    return save


def read_all(shards: Path) -> dict:
    checkpoint = ShardedCheckpoint(shards.parent)
    return {(name, state): checkpoint.read(name, state) for name in checkpoint.shapes for state in STATES}


def refusal(shards: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_all(shards)
    assert str(shards.parent) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def optim_file(shards: Path, rank: int) -> Path:
    return next(shards.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))


def model_file(shards: Path, rank: int) -> Path:
    of_rank = shards / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
    return of_rank if of_rank.exists() else shards / "mp_rank_00_model_states.pt"


# --------------------------------------------------------------------------------------------------------------------
# Files


@EVERY_RUN
def test_each_missing_file_is_named(saved, run):
    shards = saved(run)
    read = [path for path in sorted(shards.iterdir()) if "_expert_" not in path.name]
    assert len(read) == {0: 1, 1: 1 + run.ranks, 2: 1 + run.ranks, 3: 2 * run.ranks}[run.zero]
    for path in read:
        content = path.read_bytes()
        path.unlink()
        name = path.name.removeprefix("bf16_")
        assert refusal(shards) == f"{shards} is torn: {name} is missing; use another checkpoint."
        path.write_bytes(content)
    read_all(shards)


@EVERY_RUN
def test_each_cut_file_is_named(saved, run):
    shards = saved(run)
    for path in sorted(shards.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        if "_expert_" in path.name:
            read_all(shards)  # these hold the weights once more, rounded
        else:
            assert refusal(shards).startswith(f"{path} is damaged (")
        path.write_bytes(content)


def test_a_file_that_holds_something_else_is_refused(saved):
    shards = saved(Run(2, 2))
    for content in ([], {"module": 1}, "words", {"optimizer_state_dict": None}):
        for path in (model_file(shards, 0), optim_file(shards, 1)):
            before = path.read_bytes()
            torch.save(content, path)
            assert "is not a checkpoint of ZeRO 2 as DeepSpeed 0.19 writes it" in refusal(shards)
            path.write_bytes(before)


@pytest.mark.parametrize("prefix", ["", "bf16_", "fp16_"])
def test_the_names_of_all_dtypes(saved, model, prefix):
    shards = saved(Run(2, 2))
    for rank in (0, 1):
        path = optim_file(shards, rank)
        path.rename(path.with_name(prefix + path.name))
    assert torch.equal(read_all(shards)["lm_head.weight", "fp32"], model.lm_head.weight)


def test_optimizer_states_on_nvme(saved):
    shards = saved(Run(2, 3))
    (shards / "offloaded_tensors" / "rank0").mkdir(parents=True)
    assert refusal(shards) == (
        f"{shards} has optimizer states in files as they were on NVMe, which are not read; start from its weights "
        "with --reset_optimizer."
    )


@pytest.mark.parametrize("told", [0, 1, 2, 3])
@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_another_stage_than_the_manifest_tells(saved, model, written, told):
    shards = saved(Run(2, written))
    write_manifest(shards.parent, Topology(2, 0, told, "float32"), model.config, Progress(STEP))
    if told == written or {told, written} == {1, 2}:  # which differ in what is sharded while training
        read_all(shards)
    else:
        sentence = refusal(shards)
        assert "is missing" in sentence or f"is not a checkpoint of ZeRO {told} " in sentence


# --------------------------------------------------------------------------------------------------------------------
# What lies in them


def test_a_lost_fragment_is_named(saved):
    name = "model.layers.2.mlp.shared_experts.down_proj.weight"
    shards = saved(Run(4, 1))
    lost = [
        rank
        for rank in range(4)
        if name
        in torch.load(optim_file(shards, rank), weights_only=False)["optimizer_state_dict"]["param_slice_mappings"][0]
    ]
    rewrite(optim_file(shards, lost[0]), lambda c: c["optimizer_state_dict"]["param_slice_mappings"][0].pop(name))
    assert refusal(shards) == f"{shards} does not hold all of {name}; use another checkpoint."


def test_a_lost_fragment_of_one_ep_rank_is_named(saved):
    name = "model.layers.2.mlp.experts.w3"
    shards = saved(Run(4, 2, 2))
    rewrite(optim_file(shards, 3), lambda c: c["optimizer_state_dict"]["param_slice_mappings"][2].pop(name))
    assert refusal(shards) == f"{shards} does not hold all of {name}; use another checkpoint."


def test_a_lost_parameter_of_one_rank_is_named(saved):
    name = "model.layers.3.self_attn.o_proj.weight"
    shards = saved(Run(3, 3))
    rewrite(model_file(shards, 1), lambda content: content["param_shapes"][0].pop(name))
    assert refusal(shards) == f"{shards} does not hold all of {name}; use another checkpoint."


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("run", [Run(2, 2), Run(2, 3), Run(4, 3, 2)], ids=lambda run: run.name)
def test_a_vector_that_is_too_short_is_refused(saved, run, state):
    shards = saved(run)

    def cut(content: dict) -> None:
        optimizer = content["optimizer_state_dict"]
        if state == "fp32":
            vectors = optimizer["single_partition_of_fp32_groups" if run.zero < 3 else "fp32_flat_groups"]
            vectors[0] = vectors[0][:-5].clone()
        else:
            adam = optimizer["base_optimizer_state" if run.zero < 3 else "optimizer_state_dict"]["state"]
            adam[0][state] = adam[0][state][:-40].clone()

    rewrite(optim_file(shards, run.ranks - 1), cut)
    assert "lm_head.weight" in refusal(shards)


@pytest.mark.parametrize("run", [Run(2, 0), Run(2, 2), Run(2, 3)], ids=lambda run: run.name)
def test_steps_that_differ(saved, run):
    shards = saved(run)

    def change(content: dict) -> None:
        content = content.get("optimizer_state_dict") or content["optimizer"]
        content = content.get("base_optimizer_state") or content.get("optimizer_state_dict") or content
        content["state"][1]["step"] += 1

    rewrite(model_file(shards, 0) if run.zero == 0 else optim_file(shards, 0), change)
    assert refusal(shards) == f"{shards} has optimizer states of different steps [3.0, 4.0]."


def test_whole_parameters_in_an_unknown_order(saved):
    """ZeRO 0 numbers the optimizer's parameters: their shapes have to be those of matrices, then vectors."""
    shards = saved(Run(2, 0))

    def change(content: dict) -> None:
        adam = content["optimizer"]["state"]
        adam[0], adam[len(adam) - 1] = adam[len(adam) - 1], adam[0]

    rewrite(model_file(shards, 0), change)
    assert refusal(shards) == f"{shards} has optimizer groups of an unknown order; start from its weights."


OTHER_OPTIMIZERS = {
    "sgd": lambda moment: {},
    "sgd with momentum": lambda moment: {"momentum_buffer": moment},
    "lion": lambda moment: {"exp_avg": moment},
    "adafactor": lambda moment: {"step": 3, "RMS": 0.5, "exp_avg_sq_row": moment[:1], "exp_avg_sq": moment},
    "adagrad": lambda moment: {"step": torch.tensor(3.0), "sum": moment},
}


@pytest.mark.parametrize("optimizer", OTHER_OPTIMIZERS)
@EVERY_RUN
def test_the_weights_of_other_optimizers(saved, model, run, optimizer):
    """They can be exported, whatever else the optimizer has kept or not."""
    shards = saved(run)

    def change(content: dict) -> None:
        content = content.get("optimizer_state_dict") or content["optimizer"]
        content = content.get("base_optimizer_state") or content.get("optimizer_state_dict") or content
        content["state"] = {key: OTHER_OPTIMIZERS[optimizer](old["exp_avg"]) for key, old in content["state"].items()}
        if optimizer == "sgd":
            content["state"] = {}

    for path in shards.glob("*optim_states.pt" if run.zero else "mp_rank_00_model_states.pt"):
        rewrite(path, change)
    checkpoint = ShardedCheckpoint(shards.parent)
    kept = {"sgd": set(), "sgd with momentum": {"momentum_buffer"}, "lion": {"exp_avg"}}
    kept |= {"adafactor": {"exp_avg_sq"}, "adagrad": {"sum"}}
    assert set(checkpoint.state_names) == {"fp32"} | kept[optimizer]
    for name, param in model.named_parameters():
        assert torch.equal(checkpoint.read(name), param), name


# --------------------------------------------------------------------------------------------------------------------
# Memory


def is_mapped(shards: Path) -> bool:
    return str(shards) in Path("/proc/self/maps").read_text()


@EVERY_RUN
def test_mapped_files_are_given_back(saved, monkeypatch, run):
    """What has been read since the files were mapped anew, and may be resident, stays within the bound."""
    bound = 6000
    monkeypatch.setattr(zero_layout, "_MAPPED_BYTES", bound)
    shards = saved(run)
    read, resident, given_back = zero_layout.ZeroLayout.read, 0, 0

    def watched(*arguments) -> torch.Tensor:
        nonlocal resident, given_back
        tensor = read(*arguments)
        resident += tensor.nbytes
        assert not is_mapped(shards) or resident <= bound
        if not is_mapped(shards):
            resident, given_back = 0, given_back + 1
        return tensor

    monkeypatch.setattr(zero_layout.ZeroLayout, "read", watched)
    read_all(shards)
    assert given_back > 5


def test_files_are_opened_once_while_the_bound_allows_it(saved, monkeypatch):
    shards, opened = saved(Run(4, 3, 2)), []
    load = zero_layout.unpickling.load
    monkeypatch.setattr(zero_layout.unpickling, "load", lambda path: opened.append(path.name) or load(path))
    read_all(shards)
    assert sorted(opened) == sorted(path.name for path in shards.iterdir())
    assert all(re.fullmatch(r"zero_pp_rank_\d_mp_rank_00_(model|optim)_states\.pt", name) for name in opened)


def test_what_was_read_does_not_change_with_the_file(saved):
    shards = saved(Run(2, 2))
    checkpoint = ShardedCheckpoint(shards.parent)
    tensor = checkpoint.read("lm_head.weight")
    before = tensor.clone()
    tensor.zero_()
    assert torch.equal(checkpoint.read("lm_head.weight"), before)
