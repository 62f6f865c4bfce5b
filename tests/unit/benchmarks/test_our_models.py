"""Ours with Liger, compiled and with SonicMoE: the same model, or why not."""

import sys
from dataclasses import replace
from functools import partial

import liger_twin
import pytest
import torch

from benchmarks.cases import StepCase
from benchmarks.peers import our_models
from benchmarks.peers.models import OurModel
from benchmarks.peers.registry import model_peers
from benchmarks.step_equality import Expected, check_gradients, make_tokens, make_weights
from moe_hf.errors import ConfigError
from moe_hf.modeling_moe import MoERMSNorm

CASE = StepCase("small", 32, 8, 2, 24, 2, 4, 2, 96, batch=2, sequence_length=24)


def ours_with(monkeypatch, name: str):
    liger_twin.install(monkeypatch, **liger_twin.ELEMENTWISE)
    compiled = partial(our_models.compile_dense_parts, backend="eager")
    monkeypatch.setattr(our_models, "compile_dense_parts", compiled)
    return next(peer for peer in model_peers("olmoe") if peer.name == name)


@pytest.mark.parametrize("name", ["ours/liger", "ours/compiled"])
def test_ours_with_fused_norms_is_the_same_model(monkeypatch, name):
    case = replace(CASE, family="olmoe")
    weights, tokens = make_weights(case, "cpu"), make_tokens(case, "cpu")
    expected = Expected(case, weights, tokens)
    peer = ours_with(monkeypatch, name)
    model = peer.load(case, weights, tokens.device)
    assert all("forward" in vars(module) for module in model.modules() if type(module) is MoERMSNorm)
    assert not any("forward" in vars(module) for module in OurModel("ours").build(case).modules())
    errors = check_gradients(peer, case, weights, tokens, expected, "cpu")
    assert len(errors) == len(weights) and 0 < max(errors.values()) <= 1e-5


def test_ours_with_sonicmoe_asks_for_it(monkeypatch):
    monkeypatch.setattr(our_models, "choose_experts", lambda asked, **_: asked)
    peer = next(peer for peer in model_peers("mixtral") if peer.name == "ours/sonicmoe")
    assert peer.unavailable(CASE, "cuda") is None
    with torch.device("meta"):
        assert peer.build(CASE).config._experts_implementation == "sonicmoe"


def test_variants_of_ours_say_why_they_are_not_there(monkeypatch):
    names = [peer.name for peer in model_peers("olmoe")]
    assert names[0] == "ours" and {"ours/liger", "ours/compiled", "ours/sonicmoe"} < set(names)
    peers = {peer.name: peer for peer in model_peers("olmoe")}
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert peers["ours/liger"].unavailable(CASE, "cuda") == "the package liger_kernel is not installed"
    assert peers["ours/liger"].unavailable(CASE, "cpu") == "it has kernels for CUDA only"
    assert "cannot be loaded here" in peers["ours/sonicmoe"].unavailable(CASE, "cuda")
    assert "bfloat16 only" in peers["ours/sonicmoe"].unavailable(replace(CASE, dtype="fp32"), "cuda")
    assert peers["ours/sonicmoe"].unavailable(CASE, "cpu") == "it has kernels for CUDA only"
    monkeypatch.setattr("moe_hf.training.compiling._check_inductor", refuse)
    assert peers["ours/compiled"].unavailable(CASE, "cuda") == "there is no compiler"
    assert peers["ours"].unavailable(CASE, "cuda") is None


def refuse(mode: str | None) -> None:
    raise ConfigError("there is no compiler")
