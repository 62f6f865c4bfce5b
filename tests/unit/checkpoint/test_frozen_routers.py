"""Routers in no group of the optimizer are read from the fragments beside the model, cut and padded like others."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed_files import MOMENTS, Run, draw_states, live_model, odd_config, write_checkpoint

from moe_hf.checkpoint.manifest import Progress, write_manifest
from moe_hf.checkpoint.sharded import ShardedCheckpoint
from moe_hf.checkpoint.topology import Topology
from moe_hf.checkpoint.universal import TAG, write_universal
from moe_hf.errors import CheckpointError

RUN = Run(8, 3, 2, bf16=True)


def freeze(checkpoint: Path, run: Run) -> None:
    """Move the routers, which at ZeRO 3 with AutoEP are a group of their own, to where DeepSpeed keeps frozen ones."""
    for rank in range(run.ranks):
        model_path = next(checkpoint.glob(f"global_step*/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"))
        optim_path = next(checkpoint.glob(f"global_step*/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
        model, optim = (torch.load(path, weights_only=False) for path in (model_path, optim_path))
        index = next(i for i, group in enumerate(model["param_shapes"]) if all(".router." in name for name in group))
        shapes, optimizer = model["param_shapes"].pop(index), optim["optimizer_state_dict"]
        vector = optimizer["fp32_flat_groups"].pop(index).bfloat16()
        size = len(vector) // len(shapes)
        model["frozen_param_shapes"] = shapes
        model["frozen_param_fragments"] = dict(zip(shapes, vector.split(size), strict=True))
        states = optimizer["optimizer_state_dict"]["state"]
        kept = [state for i, state in sorted(states.items()) if i != index]
        optimizer["optimizer_state_dict"]["state"] = dict(enumerate(kept))
        optimizer["ds_zero_partition_groups"].pop(index)
        torch.save(model, model_path)
        torch.save(optim, optim_path)


@pytest.fixture
def frozen(tmp_path):
    """A checkpoint with frozen routers, whose slices are padded, and the weights that it was cut from."""
    model = live_model(odd_config())
    states = draw_states(model)
    checkpoint = write_checkpoint(tmp_path / "checkpoint-3", RUN, model, states)
    freeze(checkpoint, RUN)
    topology = Topology(RUN.ranks, RUN.ep, RUN.zero, "bfloat16", "frozen")
    write_manifest(checkpoint, topology, model.config, Progress(3, 12, 4))
    return checkpoint, states


def test_frozen_routers_read_back(frozen):
    path, states = frozen
    checkpoint = ShardedCheckpoint(path)
    routers = {name for name in states["fp32"] if name.endswith(".mlp.gate.weight")}
    assert checkpoint.frozen == routers and len(routers) == 3
    assert any(states["fp32"][name].numel() % RUN.ranks for name in routers), "nothing is padded"
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in states["fp32"].items()}
    for name, tensor in states["fp32"].items():
        held = tensor.bfloat16().float() if name in routers else tensor
        found = checkpoint.read(name)
        assert found.dtype == torch.float32 and torch.equal(found, held), name
    for name in states["fp32"].keys() - routers:
        for state in MOMENTS:
            assert torch.equal(checkpoint.read(name, state), states[state][name]), (state, name)


def test_frozen_routers_have_no_moments(frozen):
    path, _ = frozen
    checkpoint = ShardedCheckpoint(path)
    with pytest.raises(
        CheckpointError, match=r"has no exp_avg of model\.layers\.1\.mlp\.router\.weight, which was fro"
    ):
        checkpoint.read("model.layers.1.mlp.gate.weight", "exp_avg")


def test_a_fragment_that_is_missing_is_told(frozen):
    path, _ = frozen
    last = next(path.glob("global_step*/zero_pp_rank_7_mp_rank_00_model_states.pt"))
    content = torch.load(last, weights_only=False)
    name = next(iter(content["frozen_param_fragments"]))
    content["frozen_param_fragments"][name] = torch.empty(0)
    torch.save(content, last)
    with pytest.raises(CheckpointError, match=rf"does not hold all of {name}; use another checkpoint"):
        ShardedCheckpoint(path).read(name.replace("router", "gate"))


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_conversion_has_their_weights_alone(frozen, tmp_path, expert_parallel):
    path, states = frozen
    write_universal(ShardedCheckpoint(path), tmp_path / "out", expert_parallel=expert_parallel)
    assert json.loads((tmp_path / "out" / "files.json").read_text())
    for name, tensor in states["fp32"].items():
        if name.endswith(".mlp.gate.weight"):
            name = name.replace(".gate.", ".router.") if expert_parallel else name
            folder = tmp_path / "out" / TAG / "zero" / name
            assert [file.name for file in folder.iterdir()] == ["fp32.pt"]
            assert torch.equal(torch.load(folder / "fp32.pt")["param"], tensor.bfloat16().float())
