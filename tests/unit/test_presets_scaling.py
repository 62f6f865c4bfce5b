"""The small twin of every preset has its layers and its routing, and trains."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from launching import ROOT

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.presets import preset_names, read_preset
from moe_hf.presets.scaling import scaled_down

PRESETS = preset_names()

SHRINKS = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
}
# In bytes of 16 bits: what grouped matrix products and attention kernels want rows to be a multiple of.
ALIGNMENT = 16


def twin_of(name: str) -> MoEConfig:
    return MoEConfig(**scaled_down(read_preset(name)))


@pytest.mark.parametrize("name", PRESETS)
def test_only_sizes_shrink(name):
    original, twin = MoEConfig(**read_preset(name)), twin_of(name)
    different = {field for field in MoEConfig.__annotations__ if getattr(original, field) != getattr(twin, field)}
    assert different <= SHRINKS
    assert all(getattr(twin, field) < getattr(original, field) for field in different)
    assert {"vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"} <= different


@pytest.mark.parametrize("name", PRESETS)
def test_structure_stays(name):
    original, twin = MoEConfig(**read_preset(name)), twin_of(name)
    assert twin.mlp_layer_types == original.mlp_layer_types and len(twin.mlp_layer_types) == original.num_hidden_layers
    assert (twin.num_experts, twin.num_experts_per_tok) == (original.num_experts, original.num_experts_per_tok)
    groups = twin.num_attention_heads / twin.num_key_value_heads
    assert groups == original.num_attention_heads / original.num_key_value_heads
    assert twin.num_key_value_heads > 1


@pytest.mark.parametrize("name", PRESETS)
def test_twin_is_small_and_aligned(name):
    twin = twin_of(name)
    assert twin.hidden_size <= 64 and twin.vocab_size <= 512 and twin.max_position_embeddings <= 128
    widths = (twin.hidden_size, twin.head_dim, twin.intermediate_size, twin.moe_intermediate_size)
    assert all(2 * width % ALIGNMENT == 0 for width in widths)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in MoEForCausalLM(twin).parameters()) < 25_000_000


@pytest.mark.parametrize("name", PRESETS)
def test_twin_of_a_twin_is_itself_and_the_original_stays(name):
    values = read_preset(name)
    before = copy.deepcopy(values)
    twin = scaled_down(values)
    assert values == before and scaled_down(twin) == twin != values


def test_nothing_grows():
    tiny = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}
    tiny |= {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1, "head_dim": 8}
    assert {k: v for k, v in scaled_down(tiny).items() if k in SHRINKS} == {
        k: v for k, v in tiny.items() if k in SHRINKS
    }


def test_shared_expert_shrinks_only_where_there_is_one():
    values = read_preset("quickstart")
    assert scaled_down(values | {"shared_expert_intermediate_size": 0})["shared_expert_intermediate_size"] == 0
    assert 0 < scaled_down(values | {"shared_expert_intermediate_size": 512})["shared_expert_intermediate_size"] < 512
    assert "shared_expert_intermediate_size" not in scaled_down(values)


@pytest.mark.parametrize("name", PRESETS)
def test_twin_trains(name):
    """Three steps on one batch: every parameter gets a finite gradient, and the loss falls."""
    model = MoEForCausalLM(twin_of(name)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(model.config.vocab_size, (2, 64))
    losses = []
    for _ in range(3):
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.any(), parameter_name
        losses.append(output.ce_loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(model.config.vocab_size), rel=0.05)
    assert losses[2] < losses[1] < losses[0]


def test_presets_are_plain_values():
    """Neither reading nor scaling one loads torch, once the package itself is there."""
    code = (
        "import importlib.util, sys, types\n"
        "package = types.ModuleType('moe_hf'); package.__path__ = ['moe_hf']; sys.modules['moe_hf'] = package\n"
        "from moe_hf.presets import read_preset\n"
        "from moe_hf.presets.scaling import scaled_down\n"
        "assert scaled_down(read_preset('xlarge-70b'))['num_hidden_layers'] == 60\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
