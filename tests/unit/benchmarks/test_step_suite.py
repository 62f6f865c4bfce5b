"""Whole models: their gate, and the FLOPs of a step."""

from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
from deepspeed.compile.config import CompileConfig
from small_steps import CASE, prepare

from benchmarks.cases import FAMILIES, step_cases
from benchmarks.engines import start
from benchmarks.equality import Different
from benchmarks.peers.models import (
    AutoEPModel,
    OurModel,
    TransformersModel,
    our_config,
    transformers_config,
)
from benchmarks.peers.registry import model_peers
from benchmarks.results import FAILED, MEASURED, UNAVAILABLE, Row
from benchmarks.scaling_suite import run_scaling, slope
from benchmarks.step_equality import check_gradients, check_losses, make_tokens, make_weights
from benchmarks.step_suite import run_steps, side_by_side
from moe_hf.errors import ConfigError
from moe_hf.planning.flops import flops_per_token

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize("family", FAMILIES)
def test_our_model_is_that_of_each_family(family):
    case = replace(CASE, family=family)
    weights, tokens, expected = prepare(case)
    for peer in (OurModel("ours"), TransformersModel("peer", "grouped_mm")):
        errors = check_gradients(peer, case, weights, tokens, expected, "cpu")
        assert len(errors) == len(weights) and max(errors.values()) <= 1e-5


class WithoutRouterGradient(TransformersModel):
    """A model whose routers do not learn."""

    def build(self, case):
        model = super().build(case)
        for layer in model.model.layers:
            layer.mlp.gate.weight.requires_grad_(False)
        return model


class WrongLoss(OurModel):
    """Ours, trained on something else than it says: of one loss too much, or of one that is scaled."""

    def cross_entropy(self, model, tokens):
        loss, cross_entropy = super().cross_entropy(model, tokens)
        return loss * 1.001, cross_entropy


class WrongModel(OurModel):
    """Ours, with a weight of a loss that should be off in the gate."""

    def cross_entropy_alone(self, model):
        return nullcontext()


@pytest.mark.parametrize("wrong", [WrongLoss, WrongModel])
def test_gate_refuses_a_wrong_loss_of_ours(wrong):
    weights, tokens, expected = prepare(CASE)
    with pytest.raises(Different, match=r"gradient of model\.\S+ .* is above 1e-05"):
        check_gradients(wrong("ours"), CASE, weights, tokens, expected, "cpu")


def test_ours_is_checked_without_the_losses_of_its_routers_and_timed_with_them():
    weights, tokens, expected = prepare(CASE)
    ours = start(OurModel("ours"), CASE, weights, tokens)
    peer = start(TransformersModel("peer", "grouped_mm"), CASE, weights, tokens)
    model = ours.engine.module
    coefficients = model.config.router_aux_loss_coef, model.config.router_z_loss_coef
    assert min(coefficients) > 0
    loss, cross_entropy = ours.peer.cross_entropy(ours.engine, tokens)
    assert loss > cross_entropy
    # The timed model begins with the weights that are checked.
    with ours.peer.cross_entropy_alone(model):
        assert all(torch.equal(value, cross_entropy) for value in ours.peer.cross_entropy(ours.engine, tokens))
    assert (model.config.router_aux_loss_coef, model.config.router_z_loss_coef) == coefficients
    # As near to the reference as a model that has no other losses.
    errors, others = (max(check_losses(each, expected.losses, 1e-3).values()) for each in (ours, peer))
    assert errors < 2 * others
    ours.end(), peer.end()


class TooLittle(TransformersModel):
    """A model whose optimizer hardly moves it."""

    def optimizer(self, model, **values):
        return super().optimizer(model, **(values | {"learning_rate": 1e-5}))


def test_gate_refuses_a_wrong_gradient_and_a_wrong_loss():
    weights, tokens, expected = prepare(CASE)
    with pytest.raises(Different, match=r"gradient of model\.layers\.0\.mlp\.gate\.weight inf"):
        check_gradients(WithoutRouterGradient("peer", "eager"), CASE, weights, tokens, expected, "cpu")
    training = start(TooLittle("peer", "eager"), CASE, weights, tokens)
    # The learning rate is large for what this many parameters can learn in a step.
    with pytest.raises(Different, match=r"loss of step 3 .* is above 1e-03"):
        check_losses(training, expected.losses, 1e-3)
    training.end()


def test_losses_of_three_steps_are_those_of_plain_pytorch():
    weights, tokens, expected = prepare(CASE)
    assert expected.losses[2] < expected.losses[1] < expected.losses[0]
    training = start(TransformersModel("peer", "grouped_mm"), CASE, weights, tokens)
    assert max(check_losses(training, expected.losses, 1e-3).values()) > 0
    training.end()


def test_engines_have_the_same_settings_but_for_autoep(monkeypatch):
    asked = []
    monkeypatch.setattr("deepspeed.initialize", lambda model, optimizer, config: asked.append(config) or [mock.Mock()])
    weights, tokens = make_weights(CASE, "cpu"), make_tokens(CASE, "cpu")
    for peer in (OurModel("ours"), TransformersModel("peer", "eager"), AutoEPModel("autoep", combine_impl="x")):
        start(peer, CASE, weights, tokens)
    assert asked[0] == asked[1]
    assert asked[2] == asked[0] | {"expert_parallel": {"enabled": True, "autoep_size": 1, "combine_impl": "x"}}
    assert asked[0]["zero_optimization"] == {"stage": 1} and asked[0]["bf16"] == {"enabled": True}


def test_best_of_autoep_compiles_all_but_experts(monkeypatch):
    """As DeepSpeed offers it: an option of its JSON, and a call."""
    best = next(peer for peer in model_peers("mixtral") if peer.name == "autoep/best")
    plain = next(peer for peer in model_peers("mixtral") if peer.name == "autoep")
    asked, engines = [], (mock.Mock(), mock.Mock())
    given = iter(engines)
    monkeypatch.setattr("deepspeed.initialize", lambda config, **_: asked.append(config) or [next(given)])
    weights, tokens = make_weights(CASE, "cpu"), make_tokens(CASE, "cpu")
    for peer in (best, plain):
        assert start(peer, CASE, weights, tokens).engine in engines
    assert CompileConfig(**asked[0]["compile"]).autoep_non_moe and "compile" not in asked[1]
    assert [len(engine.compile.mock_calls) for engine in engines] == [1, 0]
    assert "Triton" in best.unavailable(CASE, "cpu")
    monkeypatch.setattr("moe_hf.training.compiling._check_inductor", refuse)
    assert (best.unavailable(CASE, "cuda"), plain.unavailable(CASE, "cuda")) == ("there is no compiler", None)


def refuse(mode: str | None) -> None:
    raise ConfigError("there is no compiler")


def test_a_model_that_fails_is_reported_beside_the_others():
    peers = [OurModel("ours"), WithoutRouterGradient("broken", "eager"), TransformersModel("absent", "none_such")]
    ours, broken, absent, matmul = run_steps([CASE], lambda family: peers, "cpu", num_rounds=1)
    assert (ours.status, broken.status, absent.status) == (MEASURED, FAILED, UNAVAILABLE)
    assert set(ours.values) >= {"step_ms", "tokens_per_second", "tflops", "ceiling_share", "peak_bytes", "max_error"}
    assert "step_ms" not in broken.values and matmul.values["ceiling_share"] == 1
    flops = CASE.tokens * flops_per_token(our_config(CASE), CASE.sequence_length).total
    assert ours.values["tflops"] == pytest.approx(flops / ours.values["step_ms"] / 1e9)


class Stopping(TransformersModel):
    """Raises when it is loaded, or asked for its loss, for the given time."""

    def __init__(self, load: int = 0, loss: int = 0) -> None:
        super().__init__("stopping", "eager")
        self.left = {"load": load, "loss": loss}

    def count(self, what: str) -> None:
        self.left[what] -= 1
        if self.left[what] == 0:
            raise RuntimeError("illegal memory access")

    def load(self, case, weights, device):
        self.count("load")
        return super().load(case, weights, device)

    def loss(self, model, tokens):
        self.count("loss")
        return super().loss(model, tokens)


# It is loaded for its gradients, its losses and the rounds; asked for one gradient, three losses, twice to be counted.
@pytest.mark.parametrize("at", [{"load": 3}, {"loss": 6}, {"loss": 9}])
def test_a_model_may_raise_at_any_time(at):
    peers = [Stopping(**at), TransformersModel("peer", "eager")]
    stopped, peer, matmul = run_steps([CASE], lambda family: peers, "cpu", num_rounds=2)
    assert (stopped.status, stopped.reason) == (FAILED, "RuntimeError: illegal memory access")
    assert peer.values["ceiling_share"] > 0 and matmul.values["ceiling_share"] == 1
    assert "step_ms" not in stopped.values


def test_flops_of_a_token():
    """Of matrices 6 for each parameter, experts only as far as they are visited, and the head; causal attention."""
    attention = 32 * 8 * (4 + 2 + 2 + 4)
    experts = 2 * 3 * 32 * 24 + 8 * 32
    found = flops_per_token(our_config(CASE), CASE.sequence_length)
    assert found.matmul == 6 * (2 * (attention + experts) + 96 * 32)
    assert found.attention == 6 * 2 * (4 * 8) * 24


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sizes_of_all_cases_are_those_of_the_models(device, family):
    for case in (case for case in step_cases(device) if case.family == family):
        with torch.device("meta"):
            model = TransformersModel("peer", "eager").build(case)
        count = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1)
        assert case.parameters == count
        assert transformers_config(case).num_experts_per_tok == case.top_k


def test_large_models_are_measured_two_by_two(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("", (), {"available": 0}))
    peers = model_peers("mixtral")[:3]
    assert [[p.name for p in pair] for pair in side_by_side(peers, CASE, "cpu")] == [
        ["ours", "mixtral/moe_hf"],
        ["ours", "mixtral/eager"],
    ]


def test_our_optimizer_is_a_row_only_where_it_is_another(monkeypatch):
    peer = next(peer for peer in model_peers("mixtral") if peer.name.endswith("our_optimizer"))
    assert "it is the default of TrainingArguments too" in peer.unavailable(CASE, "cpu")
    monkeypatch.setattr(
        "benchmarks.peers.models.TrainingArguments", lambda **values: type("", (), {"optim": "adamw_torch"})
    )
    assert peer.unavailable(CASE, "cpu") is None


def test_slope_is_the_exponent():
    assert slope([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1)
    assert slope([8, 16, 64], [5 * 8**0.5, 5 * 16**0.5, 5 * 64**0.5]) == pytest.approx(0.5)


def test_scaling_goes_on_without_who_raises(monkeypatch):
    from benchmarks import scaling_suite

    monkeypatch.setitem(scaling_suite._LAYER, "cpu", replace(scaling_suite._LAYER["cpu"], tokens=64, hidden_size=32))
    monkeypatch.setitem(scaling_suite._MODEL, "cpu", replace(CASE, layers=1, dtype="fp32"))
    # Two sizes: a gradient and two passes for memory of each, two to warm up; then a round.
    models = [TransformersModel("eager", "eager"), Stopping(loss=12)]
    axes = iter(run_scaling([], models, "cpu", num_rounds=1, factors=(1, 2)))
    eager, stopped = next(axes), next(axes)
    assert (stopped.status, stopped.reason) == (FAILED, "RuntimeError: illegal memory access")
    assert eager.values["time_slope"] != 0 and "time_slope" not in stopped.values


def test_scaling_runs_along_every_axis(monkeypatch):
    from benchmarks import scaling_suite

    layer = replace(scaling_suite._LAYER["cpu"], tokens=64, hidden_size=32, width=16)
    monkeypatch.setitem(scaling_suite._LAYER, "cpu", layer)
    monkeypatch.setitem(scaling_suite._MODEL, "cpu", replace(CASE, layers=1, dtype="fp32"))
    models = [TransformersModel("eager", "eager"), TransformersModel("absent", "none_such")]
    rows: list[Row] = list(run_scaling([], models, "cpu", num_rounds=1, factors=(1, 2, 4)))
    assert [row.config for row in rows if row.peer == "eager"] == ["layers 1 to 4", "sequence length 24 to 96"]
    assert {row.status for row in rows if row.peer == "absent"} == {UNAVAILABLE}
    layers = next(row for row in rows if row.peer == "eager")
    assert 0.5 < layers.values["held_slope"] < 1.1
