"""Sparse blocks: the gate, and what is counted; nothing here depends on time."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cases import LayerCase
from benchmarks.counting import OperatorCount, counted_synchronisations, memory_use, saved_bytes
from benchmarks.equality import Different, check_layer, poison, reference_results
from benchmarks.inputs import make_inputs
from benchmarks.layer_suite import count_layer, matmul_of, run_layers
from benchmarks.peers.base import Layer, LayerPeer
from benchmarks.peers.blocks import OUR_KERNEL, Block
from benchmarks.peers.registry import OURS, choose, layer_peers
from benchmarks.results import FAILED, MEASURED, UNAVAILABLE

CASE = LayerCase("small", 128, 64, 8, 2, 48)


@pytest.fixture(scope="module")
def prepared():
    inputs = make_inputs(CASE)
    return inputs, reference_results(CASE, inputs)


def build(case: LayerCase, implementation: str = "grouped_mm", family: str = "mixtral"):
    inputs = make_inputs(case)
    return Block(family, implementation).build(case, inputs.weights), inputs


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("experts, top_k", [(8, 2), (64, 2), (16, 8), (4, 4)])
def test_tokens_are_skewed_or_balanced_and_clearly_routed(experts, top_k, dtype):
    skewed, balanced = (
        make_inputs(LayerCase("x", 256, 256, experts, top_k, 16, dtype, routing)) for routing in ("skewed", "balanced")
    )
    assert len(set(balanced.tokens_per_expert.tolist())) == 1
    if top_k < experts:
        assert skewed.imbalance > 1.2
        for inputs in (skewed, balanced):
            logits = F.linear(inputs.hidden_states.float(), inputs.weights["router"].float())
            best = logits.topk(top_k + 1).values
            # Rounded to bfloat16, logits of this size are off by less.
            assert (best[:, -2] - best[:, -1]).min() > 0.02
    assert int(skewed.tokens_per_expert.sum()) == 256 * top_k


def test_reference_equals_the_formula(prepared):
    """Token by token, expert by expert."""
    inputs, expected = prepared
    w = {name: weight.double() for name, weight in inputs.weights.items()}
    for t in range(0, CASE.tokens, 17):
        x = inputs.hidden_states[t].double()
        probabilities = (w["router"] @ x).softmax(0)
        chosen = probabilities.argsort(descending=True)[: CASE.top_k].tolist()
        output = torch.zeros_like(x)
        for e in chosen:
            gate, up = w["gate_up"][e][: CASE.width] @ x, w["gate_up"][e][CASE.width :] @ x
            weight = probabilities[e] / probabilities[chosen].sum()
            output += weight * (w["down"][e] @ (gate * torch.sigmoid(gate) * up))
        torch.testing.assert_close(output, expected["output"][t])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", OURS])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_blocks_equal_the_reference(family, implementation, dtype):
    case = replace(CASE, dtype=dtype)
    layer, inputs = build(case, implementation, family)
    errors = check_layer(layer, case, inputs, reference_results(case, inputs))
    assert set(errors) == {"output", "hidden_states", "router", "gate_up", "down"}
    assert 0 < max(errors.values()) <= (1e-5 if dtype == "fp32" else 1e-2)


def with_fault(layer: Layer, fault: str) -> Layer:
    """Return the layer, wrong in one respect."""

    def forward(tokens):
        if fault == "output":
            return 1.0001 * layer.forward(tokens)
        if fault == "hidden_states":
            return layer.forward(tokens) + 1e-3 * (tokens - tokens.detach())
        if fault == "uninitialised":
            return layer.forward(tokens) + 0 * torch.empty_like(tokens)
        return layer.forward(tokens)

    def gradients():
        found = layer.gradients()
        if fault in found:
            # One expert of them is wrong a little.
            found[fault] = torch.cat([1.001 * found[fault][:1], found[fault][1:]])
        return found | ({"down": None} if fault == "missing" else {})

    return Layer(layer.module, forward, gradients)


@pytest.mark.parametrize("fault", ["output", "hidden_states", "router", "gate_up", "down", "missing", "uninitialised"])
def test_gate_refuses_every_wrong_result(fault, prepared):
    inputs, expected = prepared
    layer = Block("mixtral", "grouped_mm").build(CASE, inputs.weights)
    named = {"missing": "down", "uninitialised": "output"}.get(fault, fault)
    with pytest.raises(Different, match=rf"{named} \S+.* is above 1e-05"):
        check_layer(with_fault(layer, fault), CASE, inputs, expected)


def test_poison_is_found_by_who_reads_before_writing():
    """Where the allocator hands out what was freed; of large blocks the system takes the pages back."""
    poison(torch.device("cpu"), torch.float32, 2**20)
    assert any(torch.empty(2**bits // 4).isnan().any() for bits in range(9, 16))


@pytest.mark.parametrize("dtype, with_masks, without", [("fp32", 63, 55), ("bf16", 68, 60)])
def test_counted_operators_are_those_of_grouped_mm(dtype, with_masks, without):
    """Earlier Transformers mask the rows of other ranks' experts even where there are none."""
    case = replace(CASE, dtype=dtype)
    layer, inputs = build(case)
    found = count_layer(layer, case, inputs)
    assert found["operators"] == (without if hasattr(layer.module.experts, "_is_expert_parallel") else with_masks)
    assert found["synchronisations"] == 0


def test_operators_of_eager_grow_with_experts():
    counts = []
    for experts in (8, 16):
        case = replace(CASE, num_experts=experts)
        layer, inputs = build(case, "eager")
        counts.append(count_layer(layer, case, inputs))
    few, many = counts
    assert many["operators"] > 1.8 * few["operators"] > 200
    assert many["synchronisations"] > few["synchronisations"] > 8


def test_views_are_not_operators():
    x = torch.randn(4, 4)
    with OperatorCount() as counted:
        x.t().reshape(-1).unsqueeze(0).chunk(2, dim=1)
    assert set(counted.operators) <= {"aten::clone", "aten::_unsafe_view"} and counted.operators["aten::clone"] == 1
    with OperatorCount() as counted:
        x.add_(1).relu()
        float(x.sum())
    assert counted.total == 4 and counted.synchronisations == 1


def test_synchronisations_are_counted_on_the_cpu_too():
    x = torch.tensor([1.0, 0.0])
    with counted_synchronisations("cpu") as counts:
        x.nonzero(), x.sum().item(), x + 1
    assert counts == [2]


def test_saved_bytes_count_every_storage_once_and_no_weight():
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    # x is saved by the product, once more as a view by the square; the weight is left out.
    assert saved_bytes(lambda: x @ weight, [weight]) == 8 * 4 * 4
    assert saved_bytes(lambda: (x @ weight) + x.t().square().t(), [weight]) == 8 * 4 * 4
    assert saved_bytes(lambda: (x @ weight).exp(), [weight]) == 2 * 8 * 4 * 4


def test_memory_is_what_is_allocated_inside_operators_too():
    x = torch.randn(256, 256, requires_grad=True)
    size = x.nbytes
    used = memory_use("cpu", lambda: (x * 2).exp().sum(), lambda loss: loss.backward())
    # exp keeps its result; the product is let go of behind it.
    assert used.held == pytest.approx(size, rel=0.02)
    assert 2 * size <= used.peak <= 4 * size


@pytest.mark.parametrize("width, low, high", [(96, 2.2, 3.0), (24, 2.7, 3.9)])
def test_saved_bytes_of_grouped_mm(width, low, high):
    """2.7 to 3.7 times the minimum on Transformers 5.17, less without the masks of later ones; most where fine."""
    case = replace(CASE, width=width)
    layer, inputs = build(case)
    assert low < count_layer(layer, case, inputs)["saved_over_minimum"] < high


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("experts", [8, 64])
def test_our_block_saves_little_in_few_operators(experts, dtype):
    counts = []
    for number in (experts, 2 * experts):
        case = LayerCase("bars", 512, 256, number, 2, 256, dtype)
        layer, inputs = build(case, OUR_KERNEL, OURS)
        check_layer(layer, case, inputs, reference_results(case, inputs))
        counts.append(count_layer(layer, case, inputs))
    assert counts[0]["operators"] == counts[1]["operators"] <= 45
    assert counts[0]["saved_over_minimum"] <= 1.15
    assert counts[0]["synchronisations"] == 0


class Broken(LayerPeer):
    """Raises where it is told to."""

    name = "broken"

    def __init__(self, where: str) -> None:
        self.where = where

    def unavailable(self, case, device):
        return "it is not there" if self.where == "unavailable" else None

    def build(self, case, weights):
        if self.where == "build":
            raise RuntimeError("no kernel image is available")
        layer = Block("mixtral", "grouped_mm").build(case, weights)
        return with_fault(layer, "down") if self.where == "wrong" else layer


@pytest.mark.parametrize(
    "where, status, reason",
    [
        ("unavailable", UNAVAILABLE, "it is not there"),
        ("build", FAILED, "RuntimeError: no kernel image is available"),
        ("wrong", FAILED, "Different: relative error of down"),
        ("nowhere", MEASURED, None),
    ],
)
def test_a_peer_that_fails_is_reported_and_not_timed(where, status, reason):
    peers = [Broken(where), Block("mixtral", "eager")]
    broken, eager, matmul = run_layers([CASE], peers, "cpu", num_rounds=1)
    assert broken.status == status and (broken.reason or "").startswith(reason or "")
    assert ("forward_backward_ms" in broken.values) == (status == MEASURED)
    assert eager.status == MEASURED and eager.values["forward_backward_ms"] > eager.values["forward_ms"] > 0
    assert matmul.peer == "matmul" and matmul.values["ceiling_share"] == 1


class Stopping(Block):
    """Raises when it is asked for the given pass: two are compared, four counted, two warm up."""

    def __init__(self, at: int) -> None:
        super().__init__("mixtral", "grouped_mm", "stopping")
        self.at = at

    def build(self, case, weights):
        layer, calls = super().build(case, weights), []

        def forward(tokens):
            calls.append(tokens)
            if len(calls) == self.at:
                raise RuntimeError("illegal memory access")
            return layer.forward(tokens)

        return Layer(layer.module, forward, layer.gradients)


@pytest.mark.parametrize("at", [2, 3, 6, 7, 9])
def test_a_peer_may_raise_at_any_time(at):
    eager = Block("mixtral", "eager")
    stopped, other, matmul = run_layers([CASE], [Stopping(at), eager], "cpu", num_rounds=2)
    assert (stopped.status, stopped.reason) == (FAILED, "RuntimeError: illegal memory access")
    assert "forward_backward_ms" not in stopped.values
    assert other.values["ceiling_share"] > 0 and matmul.status == MEASURED


def test_the_end_of_a_run_leaves_what_is_known(monkeypatch):
    """As where a kernel has broken the GPU: rows of this case that failed, and all of those before."""
    cases = [replace(CASE, name="first"), replace(CASE, name="second")]
    made = []

    def ceiling(*_):
        made.append(1)
        if len(made) == 2:
            raise RuntimeError("unspecified launch failure")
        return lambda: {"forward_backward_ms": 1.0}

    monkeypatch.setattr("benchmarks.layer_suite.matmul_of", ceiling)
    rows = []
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        rows.extend(run_layers(cases, [Stopping(3), Block("mixtral", "eager")], "cpu", num_rounds=1))
    assert [(row.config, row.peer) for row in rows] == [
        *(("first", name) for name in ("stopping", "mixtral/eager", "matmul")),
        ("second", "stopping"),
    ]


def test_ceiling_is_told_as_of_the_same_flops(monkeypatch):
    """A product of other FLOPs than asked for counts as much longer or shorter."""
    monkeypatch.setattr("benchmarks.timing.CpuClock.milliseconds", lambda self: [2.0])
    (time,) = matmul_of(2 * 128**3, torch.empty(0))().values()
    assert time == 2.0
    (time,) = matmul_of(2 * 140**3, torch.empty(0))().values()
    assert time == pytest.approx(2.0 * (140 / 128) ** 3)


def test_a_ceiling_that_is_too_large_is_several_products(monkeypatch):
    monkeypatch.setattr("benchmarks.layer_suite._LARGEST_PRODUCT", 128)
    monkeypatch.setattr("benchmarks.timing.CpuClock.milliseconds", lambda self: [2.0])
    made = []
    monkeypatch.setattr("torch.mm", lambda a, b, out: made.append(a.shape))
    (time,) = matmul_of(3 * 2 * 128**3, torch.empty(0))().values()
    assert time == 2.0 and made == [(128, 128)] * 3
    made.clear()
    (time,) = matmul_of(2.2 * 2 * 128**3, torch.empty(0))().values()
    assert len(made) == 3 and made[0][0] <= 128
    assert time == pytest.approx(2.0 * 2.2 * 128**3 / (3 * made[0][0] ** 3))


def test_flops_and_minimum():
    case = LayerCase("x", tokens=10, hidden_size=8, num_experts=4, top_k=2, width=16, dtype="bf16")
    # Three matrices for each of two experts, and the router.
    assert case.flops == 6 * 10 * (2 * 3 * 8 * 16 + 4 * 8)
    assert case.minimum_saved == 2 * 8 + 4 * 2 * 16
    assert replace(case, dtype="fp32").minimum_saved == 2 * case.minimum_saved


def test_every_peer_says_why_it_is_not_there(monkeypatch):
    for package in ("liger_kernel", "sonicmoe", "scattermoe", "megablocks", "tutel", "deepspeed"):
        monkeypatch.setitem(sys.modules, package, None)
    peers = [peer for peer in layer_peers() if not isinstance(peer, Block)]
    reasons = {peer.name: peer.unavailable(replace(CASE, dtype="bf16"), "cuda") for peer in peers}
    assert len(reasons) == 9
    assert all(reason is not None and reason.endswith("is not installed") for reason in reasons.values()), reasons
    # Kernels for GPUs, some of them for 16 bits only.
    assert all(peer.unavailable(CASE, "cpu") is not None for peer in peers)


def test_ours_is_always_beside_the_chosen():
    assert [peer.name for peer in choose(layer_peers(), ["mixtral/eager"])] == [OURS, "mixtral/eager"]
    assert len(choose(layer_peers(), None)) == len(layer_peers())
    # Whoever is named first is measured first.
    names = ["olmoe/eager", "autoep", "mixtral/eager"]
    assert [peer.name for peer in choose(layer_peers(), names)] == [OURS, *names]


def test_autoep_equals_the_reference(prepared, alone):
    inputs, expected = prepared
    peer = next(peer for peer in layer_peers() if peer.name == "autoep")
    layer = peer.build(CASE, inputs.weights)
    assert max(check_layer(layer, CASE, inputs, expected).values()) <= 1e-5
