"""The Triton kernels of the experts on a GPU, with the tiles that training uses."""

import pytest
import torch
from experts_cases import Case, check, check_again, make_inputs, reference, relative_error, run

pytestmark = pytest.mark.gpu

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = [
    Case(T=2000, H=512, E=8, K=2, I=384, dtype=torch.bfloat16),
    Case(T=2000, H=512, E=8, K=2, I=384, dtype=torch.float16, packed=False),
    Case(T=500, H=512, E=8, K=2, I=384),
    Case(T=1500, H=520, E=16, K=8, I=200, dtype=torch.bfloat16, packed=False),
    Case(T=300, H=100, E=5, K=3, I=36),
    Case(T=301, H=99, E=5, K=3, I=35, packed=False),
    Case(T=200, H=256, E=64, K=2, I=128, dtype=torch.bfloat16),
    Case(T=1000, H=256, E=4, K=1, I=256, routing="nobody", dtype=torch.bfloat16, packed=False),
    Case(T=1000, H=256, E=4, K=2, I=256, routing="nobody", dtype=torch.bfloat16),
    Case(T=600, H=256, E=8, K=2, I=128, routing="one", dtype=torch.bfloat16),
    Case(T=600, H=256, E=8, K=2, I=128, strided=True, dtype=torch.bfloat16),
]


@pytest.fixture
def backend():
    from moe_hf.kernels import experts_triton

    # This fills what is only allocated with NaN: nothing of it may be read. The reference may multiply as it likes.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield experts_triton
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_equal_the_formula(case, backend):
    check(backend, case, make_inputs(case, "cuda"), LIMITS[case.dtype])


@pytest.mark.parametrize("case", [case for case in CASES if case.routing == "uneven"], ids=str)
def test_a_second_run_gives_the_same_bits(case, backend):
    check_again(backend, case, make_inputs(case, "cuda"))


@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(1, 1, 1), (20_000, 8, 64), (5000, 3, 300)])
def test_sorting_equals_that_of_torch(num_tokens, top_k, num_experts, backend):
    index = torch.randint(0, num_experts + 1, (num_tokens, top_k), device="cuda")
    order = backend.sort_by_expert(index, num_experts)
    rows = torch.sort(index.flatten(), stable=True).indices
    assert torch.equal(order.rows.long(), rows)
    assert torch.equal(order.places.long(), rows.argsort())
    counts = torch.bincount(index.flatten().cpu(), minlength=num_experts + 1)
    assert torch.equal(order.ends.cpu().long(), counts[:-1].cumsum(0))


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_host_never_waits(top_k, backend):
    case = Case(T=512, H=128, E=8, K=top_k, I=64, dtype=torch.bfloat16)
    inputs = make_inputs(case, "cuda")
    run(backend, case, inputs)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(backend, case, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_recorded_graph_follows_other_routing(backend):
    """A recording holds no sizes of this routing: the grid is the same for all."""
    case = Case(T=512, H=128, E=8, K=2, I=64, dtype=torch.bfloat16)
    inputs = make_inputs(case, "cuda")
    run(backend, case, inputs)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(backend, case, inputs)
    inputs.top_k_index.copy_(torch.stack([torch.randperm(case.E)[: case.K] for _ in range(case.T)]))
    graph.replay()
    right = reference(case, inputs)
    errors = {name: relative_error(value, right[name]) for name, value in results.items()}
    assert max(errors.values()) <= LIMITS[case.dtype], errors


def test_no_copies_of_rows_are_written(backend):
    """Forward: the product, the activations, the rows of outputs, their sums. Nothing padded, nothing in float32."""
    torch.use_deterministic_algorithms(False)
    case = Case(T=8192, H=512, E=16, K=4, I=256, dtype=torch.bfloat16)
    inputs = make_inputs(case, "cuda")
    order = backend.sort_by_expert(inputs.top_k_index, case.E)
    words = (inputs.hidden_states, inputs.top_k_weights, order, [inputs.gate_up], inputs.down)
    backend.forward(*words)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    backend.forward(*words)
    num_rows = case.T * case.K
    least = 2 * (num_rows * (3 * case.I + case.H) + case.T * case.H)
    assert torch.cuda.max_memory_allocated() - before <= 1.01 * least


def test_offsets_may_pass_32_bits(backend):
    """The product has more than 2³¹ elements. The last tokens alone show whether its last rows are right."""
    torch.use_deterministic_algorithms(False)
    case = Case(T=140_000, H=128, E=8, K=8, I=1024, dtype=torch.bfloat16)
    assert case.T * case.K * 2 * case.I > 2**31
    inputs = make_inputs(case, "cuda")
    results = run(backend, case, inputs, needs=(True, True, False, False))
    some = slice(-200, None)
    few = inputs._replace(
        hidden_states=inputs.hidden_states[some],
        top_k_index=inputs.top_k_index[some],
        top_k_weights=inputs.top_k_weights[some],
        gradient=inputs.gradient[some],
    )
    right = reference(case._replace(T=200), few)
    for name in ("output", "hidden_states", "top_k_weights"):
        assert relative_error(results[name][some], right[name]) <= LIMITS[case.dtype], name


def test_offsets_of_gathered_rows_may_pass_32_bits(backend):
    torch.use_deterministic_algorithms(False)
    inputs = make_inputs(Case(T=140_000, H=2048, E=8, K=8, I=16, dtype=torch.bfloat16), "cuda")
    order = backend.sort_by_expert(inputs.top_k_index, 8)
    rows = backend.gather_rows(inputs.hidden_states, None, order)
    assert rows.numel() > 2**31
    for some in (slice(200), slice(-200, None)):
        assert torch.equal(rows[some], inputs.hidden_states[order.rows[some] // 8])


def test_rows_of_other_ranks_equal_those_of_the_cpu(backend):
    from moe_hf.kernels import experts_aten

    inputs = make_inputs(Case(T=700, H=256, E=8, K=2, I=64, routing="nobody"), "cuda")
    order = backend.sort_by_expert(inputs.top_k_index, 8)
    rows = backend.gather_rows(inputs.hidden_states, inputs.top_k_weights, order)
    assert torch.equal(rows, experts_aten.gather_rows(inputs.hidden_states, inputs.top_k_weights, order))
    here, there = [*order], [tensor.cpu() for tensor in order]
    for name, given in (
        ("sum_rows", lambda device: (rows.to(device), inputs.top_k_weights.to(device))),
        ("dot_rows", lambda device: (inputs.gradient.to(device), rows.to(device))),
    ):
        more = (700,) if name == "sum_rows" else ()
        on_gpu = getattr(backend, name)(*given("cuda"), type(order)(*here), *more)
        if name == "dot_rows":
            rows[order.ends[-1] :] = 0  # of nobody: the CPU's rows are zeroed by its sum
        on_cpu = getattr(experts_aten, name)(*given("cpu"), type(order)(*there), *more)
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-5)
