"""The experts kernel computes what a loop over tokens computes, keeps little, and serves models of Transformers."""

import pytest
import torch
import torch.nn.functional as F
from helpers_model import Dispatched
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_hf.kernels import experts, experts_aten
from moe_hf.kernels.dispatch import gather_rows, sum_rows
from moe_hf.kernels.expert_order import ExpertOrder
from moe_hf.kernels.experts import run_experts, sort_by_expert

T, H, E, WIDTH = 37, 12, 8, 10
NOBODY = E
KINDS = ("unbalanced", "one takes all", "nobody's")


def routing(kind: str, top_k: int) -> torch.Tensor:
    """Return `(T, K)` experts; the sixth has no rows."""
    logits = torch.randn(T, E) + torch.linspace(0, 2, E)
    logits[:, 5] = -99
    index = logits.topk(top_k, dim=-1).indices
    if kind == "one takes all":
        return torch.zeros_like(index) + 3
    return torch.where(torch.rand(T, top_k) < 0.3, NOBODY, index) if kind == "nobody's" else index


def make_inputs(top_k: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return hidden states, weights of the routing, gate and up packed, and down; all want gradients."""
    shapes = (T, H), (T, top_k), (E, 2 * WIDTH, H), (E, H, WIDTH)
    return [torch.randn(shape, dtype=dtype).mul_(0.5).requires_grad_() for shape in shapes]


def by_loop(index, x, top_k_weights, gate_up, down) -> torch.Tensor:
    rows = []
    for token, chosen in enumerate(index.tolist()):
        row = torch.zeros(H, dtype=x.dtype)
        for slot, expert in enumerate(chosen):
            if expert != NOBODY:
                gate, up = (gate_up[expert] @ x[token]).split(WIDTH)
                row = row + top_k_weights[token, slot] * (down[expert] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(output.shape, generator=generator).bfloat16()  # the same numbers in every dtype
    return list(torch.autograd.grad(output, inputs, factors.to(output.dtype)))


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [True, False])
def test_output_and_gradients_equal_a_loop_over_tokens(packed, kind, top_k):
    torch.manual_seed(0)
    index, inputs = routing(kind, top_k), make_inputs(top_k)
    expected = by_loop(index, *inputs)
    x, top_k_weights, gate_up, down = inputs
    parts = [gate_up] if packed else list(gate_up.chunk(2, dim=1))
    actual = run_experts(x, top_k_weights, sort_by_expert(index, E), parts, down)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    for ours, wanted in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_other_ranks_equal_those_computed_here(kind):
    """Gathered, computed as rows of their own and summed: the way through an all-to-all that brings back the same."""
    torch.manual_seed(0)
    index, inputs = routing(kind, 3), make_inputs(3)
    x, top_k_weights, gate_up, down = inputs
    order = sort_by_expert(index, E)
    every_row = torch.arange(len(order.rows), dtype=torch.int32)
    rows = run_experts(gather_rows(x, order), None, ExpertOrder(every_row, every_row, order.ends), [gate_up], down)
    actual, expected = sum_rows(rows, top_k_weights, order), run_experts(x, top_k_weights, order, [gate_up], down)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    for ours, wanted in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_16_bits_round_results_and_no_sums(dtype):
    torch.manual_seed(0)
    index, inputs = routing("unbalanced", 4), make_inputs(4, torch.float32)
    x, _, gate_up, down = low = [t.detach().to(dtype).requires_grad_() for t in inputs]
    low[1] = inputs[1].detach().requires_grad_()  # the routers' weights are float32
    exact = [t.detach().double().requires_grad_() for t in low]
    actual = run_experts(x, low[1], sort_by_expert(index, E), [gate_up], down)
    expected = by_loop(index, *exact)
    bound = 8 * torch.finfo(dtype).eps
    for ours, wanted in zip([actual, *gradients(actual, low)], [expected, *gradients(expected, exact)], strict=True):
        assert ours.dtype == (torch.float32 if ours.shape == index.shape else dtype)
        assert (ours.double() - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)])
def test_only_what_needs_a_gradient_gets_one(wanted):
    torch.manual_seed(0)
    index, inputs = routing("unbalanced", 2), make_inputs(2)
    x, top_k_weights, gate_up, down = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    output = run_experts(x, top_k_weights, sort_by_expert(index, E), [gate_up], down)
    expected = gradients(by_loop(index, *inputs), [inputs[i] for i in wanted])
    actual = gradients(output, [(x, top_k_weights, gate_up, down)[i] for i in wanted])
    for ours, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-13)


def test_weights_are_not_rounded_to_16_bits():
    torch.manual_seed(0)
    order, top_k_weights = sort_by_expert(routing("unbalanced", 4), E), torch.rand(T, 4)
    ones = torch.ones(T * 4, H, dtype=torch.bfloat16)
    expected = top_k_weights.sum(dim=1, keepdim=True).bfloat16().expand(T, H)
    assert torch.equal(sum_rows(ones, top_k_weights, order), expected)


def test_no_tokens_have_come():
    """As a rank may find whose experts nobody has chosen."""
    x, _, gate_up, down = make_inputs(1)
    x = x.detach()[:0].requires_grad_()
    order = sort_by_expert(torch.empty(0, 1, dtype=torch.int64), E)
    output = run_experts(x, None, order, [gate_up], down)
    output.sum().backward()
    assert output.shape == x.grad.shape == (0, H)
    assert not gate_up.grad.any() and not down.grad.any()


def test_same_numbers_without_gradients_and_under_autocast():
    torch.manual_seed(0)
    index, inputs = routing("unbalanced", 2), make_inputs(2, torch.float32)
    x, top_k_weights, gate_up, down = inputs
    order = sort_by_expert(index, E)
    with_gradients = run_experts(x, top_k_weights, order, [gate_up], down)
    with torch.no_grad():
        assert torch.equal(run_experts(x, top_k_weights, order, [gate_up], down), with_gradients)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run_experts(x, top_k_weights, order, [gate_up], down)
    low = [t.bfloat16() for t in (x, gate_up, down)]
    assert torch.equal(cast, run_experts(low[0], top_k_weights, order, [low[1]], low[2]))


@pytest.mark.parametrize("max_rows", [1, 20, 50])
@pytest.mark.parametrize("packed", [True, False])
def test_same_numbers_in_blocks_of_any_size(monkeypatch, max_rows, packed):
    torch.manual_seed(0)
    index, (x, top_k_weights, gate_up, down) = routing("nobody's", 2), make_inputs(2)
    order = sort_by_expert(index, E)

    def run(rows: int) -> list[torch.Tensor]:
        monkeypatch.setattr(experts_aten, "_MAX_ROWS", rows)
        output = run_experts(x, top_k_weights, order, [gate_up] if packed else list(gate_up.chunk(2, 1)), down)
        return [output, *gradients(output, [x, top_k_weights, gate_up, down])]

    at_once = run(len(order.rows))
    assert all(torch.equal(one, other) for one, other in zip(run(max_rows), at_once, strict=True))


def test_operators_keep_torchs_rules():
    torch.manual_seed(0)
    index, inputs = routing("unbalanced", 2), make_inputs(2)
    x, top_k_weights, gate_up, down = (tensor.detach() for tensor in inputs)
    order = sort_by_expert(index, E)
    torch.library.opcheck(experts._sort, (index, E))
    torch.library.opcheck(experts._experts, (x, top_k_weights, *order, [gate_up], down, True))
    torch.library.opcheck(experts._experts, (x, None, *order, list(gate_up.chunk(2, 1)), down, True))
    product = torch.randn(len(order.rows), 2 * WIDTH, dtype=x.dtype)
    of_all, of_x = [True] * 4, [True, False, False, False]
    torch.library.opcheck(experts._experts_backward, (x, x, top_k_weights, product, *order, [gate_up], down, of_all))
    torch.library.opcheck(experts._experts_backward, (x, x, None, product, *order, [gate_up], down, of_x))


def test_autograd_keeps_gradients_as_they_were_written(monkeypatch):
    """A gradient that something else still holds would be copied, whole weights at a time."""
    written = []

    def note(*args, **kwargs):
        gradients = experts_aten_backward(*args, **kwargs)
        written.extend(tensor.data_ptr() for tensor in (*gradients[2], gradients[3]))
        return gradients

    experts_aten_backward = experts_aten.backward
    monkeypatch.setattr(experts_aten, "backward", note)
    torch.manual_seed(0)
    index, (x, top_k_weights, gate_up, down) = routing("unbalanced", 2), make_inputs(2)
    run_experts(x, top_k_weights, sort_by_expert(index, E), [gate_up], down).sum().backward()
    assert written == [gate_up.grad.data_ptr(), down.grad.data_ptr()]


# --------------------------------------------------------------------------------------------------------------------
# What it costs


def layer_of(num_experts: int, implementation: str, top_k: int = 2, width: int = 16):
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=width,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        num_hidden_layers=1,
        vocab_size=8,
    )
    model = MixtralForCausalLM._from_config(config, experts_implementation=implementation)
    return model.model.layers[0].mlp


@pytest.mark.parametrize("num_experts", [4, 64])
def test_few_operators_however_many_experts(num_experts):
    layer = layer_of(num_experts, "moe_hf")
    with Dispatched() as dispatched:
        layer(torch.randn(1, 64, 32, requires_grad=True)).sum().backward()
    assert len(dispatched.names) <= 45, dispatched.names
    reference = layer_of(num_experts, "grouped_mm")
    with Dispatched() as theirs:
        reference(torch.randn(1, 64, 32, requires_grad=True)).sum().backward()
    assert len(dispatched.names) < 0.7 * len(theirs.names)


@pytest.mark.parametrize(("top_k", "width"), [(2, 64), (8, 32)])
def test_keeps_little_more_than_input_and_products(top_k, width):
    hidden, num_tokens = 64, 256
    x = torch.randn(num_tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    gate_up = torch.randn(16, 2 * width, hidden, dtype=torch.bfloat16, requires_grad=True)
    down = torch.randn(16, hidden, width, dtype=torch.bfloat16, requires_grad=True)
    top_k_weights, index = torch.randn(num_tokens, 16).softmax(-1).topk(top_k)
    known = {t.untyped_storage().data_ptr() for t in (gate_up, down)}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_experts(x, top_k_weights, sort_by_expert(index, 16), [gate_up], down)
    size = sum(t.untyped_storage().nbytes() for where, t in kept.items() if where not in known)
    least = num_tokens * (2 * hidden + 4 * top_k * width)
    indices = num_tokens * top_k * (4 + 4 + 4) + 16 * 4  # rows, places, weights; ends
    assert size == least + indices
    assert x.untyped_storage().data_ptr() in kept


# --------------------------------------------------------------------------------------------------------------------
# Models

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
SIZES |= {"num_experts_per_tok": 2, "intermediate_size": 48}
MODELS = {
    "mixtral": lambda: (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=8)),
    "qwen3_moe": lambda: (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=24)),
    "olmoe": lambda: (OlmoeForCausalLM, OlmoeConfig(**SIZES, num_experts=8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_serves_models_of_transformers(name):
    model_class, config = MODELS[name]()
    torch.manual_seed(0)
    model = model_class._from_config(config, experts_implementation="eager")
    tokens = torch.randint(0, 64, (2, 11))

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        return {"loss": loss.detach()} | {key: p.grad.clone() for key, p in model.named_parameters()}

    expected = step()
    model.set_experts_implementation("moe_hf")
    actual = step()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=1e-5, atol=1e-7, msg=key)


def test_compiles_into_one_graph():
    layer = layer_of(8, "moe_hf")
    tokens = torch.randn(1, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(tokens), layer(tokens))


def test_other_experts_are_refused():
    layer = layer_of(4, "moe_hf")
    layer.experts.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match=r"computes SwiGLU experts without biases, .* MixtralExperts has others; use"):
        layer(torch.randn(1, 4, 32))
    layer.experts.act_fn, layer.experts.has_bias = torch.nn.SiLU(), True
    with pytest.raises(ValueError, match=r'use "grouped_mm"\.'):
        layer(torch.randn(1, 4, 32))
