"""Runs in a process of its own, whose Triton interprets: each case becomes a line of JSON, its name and its error."""

import json
import sys
import traceback

import kernels_alone  # noqa: F401
import torch
from experts_cases import Case, check, check_again, make_inputs, run

from moe_hf.kernels import experts_aten, experts_triton, triton_tiles
from moe_hf.kernels.triton_tiles import Tile, Tiles

# Smaller than all shapes, and different from each other.
SMALL = Tiles(
    rows=16,
    gate_up=Tile(16, 32, 4, 2),
    down=Tile(32, 16, 4, 2),
    activation_gradient=Tile(16, 16, 4, 2),
    input_gradient=Tile(32, 16, 4, 2),
    weight_rows=32,
    weight_gradient=Tile(16, 16, 4, 2),
)
LIMITS = {torch.float32: 1e-6, torch.float16: 2e-3}


def compare(case: Case) -> None:
    experts_triton.tiles_for = lambda *_: SMALL
    check(experts_triton, case, make_inputs(case), LIMITS[case.dtype])


def a_second_time() -> None:
    experts_triton.tiles_for = lambda *_: SMALL
    case = Case(T=5, H=20, E=2, K=2, I=16)
    check_again(experts_triton, case, make_inputs(case))


def tiles_of_the_table() -> None:
    """The tiles that a GPU of a workstation would get; blocks larger than the shapes."""
    experts_triton.tiles_for = triton_tiles.tiles_for
    case = Case(T=70, H=36, E=2, K=1, I=20, packed=False)
    check(experts_triton, case, make_inputs(case), LIMITS[case.dtype])


def only_what_is_needed() -> None:
    experts_triton.tiles_for = lambda *_: SMALL
    case = Case(T=5, H=16, E=2, K=2, I=12, packed=False)
    inputs = make_inputs(case)
    whole = run(experts_triton, case, inputs)
    alone = [tuple(place == only for place in range(4)) for only in range(4)]
    for needs in [(False,) * 4, *alone, (True, True, False, False)]:
        part = run(experts_triton, case, inputs, needs)
        for name, need in zip(list(whole)[1:], needs, strict=True):
            assert torch.equal(part[name], whole[name]) if need else part[name] is None, (needs, name)


def weights_in_16_bits() -> None:
    experts_triton.tiles_for = lambda *_: SMALL
    for top_k in (1, 2):
        case = Case(T=9, H=16, E=2, K=top_k, I=12)
        inputs = make_inputs(case)
        check(experts_triton, case, inputs._replace(top_k_weights=torch.ones(9, top_k).half()), LIMITS[torch.float16])


def saved_product() -> None:
    """Its rows are those of the sorted tokens, gate first; those of nobody are left as they are."""
    experts_triton.tiles_for = lambda *_: SMALL
    case = Case(T=40, H=20, E=3, K=2, I=24, routing="nobody")
    inputs = make_inputs(case)
    order = experts_triton.sort_by_expert(inputs.top_k_index, case.E)
    saved = experts_triton.forward(inputs.hidden_states, inputs.top_k_weights, order, [inputs.gate_up], inputs.down)[1]
    for row, assignment in enumerate(order.rows.tolist()):
        expert = inputs.top_k_index.flatten()[assignment]
        if expert < case.E:
            right = inputs.gate_up[expert] @ inputs.hidden_states[assignment // case.K]
            torch.testing.assert_close(saved[row], right, rtol=1e-5, atol=1e-5)
        else:
            assert row >= order.ends[-1] and saved[row].isnan().all()  # of torch.empty, see below


def no_tokens() -> None:
    experts_triton.tiles_for = lambda *_: SMALL
    for top_k, packed in ((1, True), (2, False)):
        case = Case(T=0, H=20, E=3, K=top_k, I=12, packed=packed)
        inputs = make_inputs(case)
        results = run(experts_triton, case, inputs)
        assert results["output"].shape == results["hidden_states"].shape == (0, 20)
        assert results["top_k_weights"].shape == (0, top_k)
        assert not results["gate_up"].any() and not results["down"].any()


def rows_of_other_ranks() -> None:
    """Rows that weigh nothing of their own; gathered before, and summed and weighed after."""
    experts_triton.tiles_for = lambda *_: SMALL
    for top_k, routing in ((1, "nobody"), (2, "uneven")):
        case = Case(T=21, H=20, E=4, K=top_k, I=12, routing=routing, packed=False)
        inputs = make_inputs(case)
        ones = torch.ones_like(inputs.top_k_weights)
        needs = (True, False, True, True)
        unweighted, right = (run(experts_triton, case, inputs._replace(top_k_weights=w), needs) for w in (None, ones))
        assert all(torch.equal(value, right[name]) for name, value in unweighted.items() if name != "top_k_weights")
        weights, order = inputs.top_k_weights, experts_triton.sort_by_expert(inputs.top_k_index, case.E)
        for given in (None, weights):
            rows, right = (b.gather_rows(inputs.hidden_states, given, order) for b in (experts_triton, experts_aten))
            assert torch.equal(rows, right)
            total, right = (b.sum_rows(rows.clone(), given, order, case.T) for b in (experts_triton, experts_aten))
            torch.testing.assert_close(total, right, rtol=1e-6, atol=1e-6)
        right = (inputs.gradient[order.rows // top_k] * rows).sum(1)
        right[order.ends[-1] :] = 0
        products = experts_triton.dot_rows(inputs.gradient, rows, order)
        torch.testing.assert_close(products.flatten(), right[order.places], rtol=1e-5, atol=1e-5)


def gathered_rows() -> None:
    """Bit for bit those of ATen: more columns than one program has, 16 bits, columns far apart, nobody's rows, none."""
    for case in (
        Case(T=7, H=33, E=4, K=3, I=4),
        Case(T=5, H=2100, E=4, K=1, I=4, routing="nobody"),
        Case(T=9, H=20, E=8, K=8, I=4, dtype=torch.float16),
        Case(T=9, H=20, E=4, K=2, I=4, routing="nobody", strided=True),
        Case(T=0, H=20, E=4, K=2, I=4),
    ):
        inputs = make_inputs(case)
        order = experts_triton.sort_by_expert(inputs.top_k_index, case.E)
        weights = inputs.top_k_weights
        for tokens in (inputs.hidden_states, inputs.gradient):
            for given in (None, weights, weights.half(), weights.t().contiguous().t()):
                rows, right = (b.gather_rows(tokens, given, order) for b in (experts_triton, experts_aten))
                assert torch.equal(rows, right) and rows.dtype == case.dtype, str(case)


def without_a_backward_pass() -> None:
    experts_triton.tiles_for = lambda *_: SMALL
    case = Case(T=9, H=16, E=2, K=2, I=12)
    inputs = make_inputs(case)
    order = experts_triton.sort_by_expert(inputs.top_k_index, case.E)
    given = inputs.hidden_states, inputs.top_k_weights, order, [inputs.gate_up], inputs.down
    output, product = experts_triton.forward(*given, keeps_product=False)
    assert torch.equal(output, experts_triton.forward(*given)[0]) and product.shape == (0, 24)


def sorting() -> None:
    """Against torch's own stable sort, over several blocks; whatever is no expert comes last."""
    for num_tokens, top_k, num_experts in ((1, 1, 1), (64, 2, 8), (333, 3, 5), (40, 8, 130)):
        index = torch.randint(-1, num_experts + 2, (num_tokens, top_k)) if num_experts > 1 else torch.zeros(1, 1).long()
        order = experts_triton.sort_by_expert(index.t().contiguous().t(), num_experts)
        expert = torch.where((index < 0) | (index > num_experts), num_experts, index).flatten()
        rows = torch.sort(expert, stable=True).indices
        assert torch.equal(order.rows.long(), rows)
        assert torch.equal(order.places.long(), rows.argsort())
        assert torch.equal(order.ends.long(), torch.bincount(expert, minlength=num_experts + 1)[:-1].cumsum(0))
        assert {tensor.dtype for tensor in order} == {torch.int32}


CASES = [
    Case(T=20, H=40, E=4, K=2, I=24),
    Case(T=30, H=33, E=4, K=2, I=17, packed=False),
    Case(T=10, H=20, E=10, K=8, I=16, packed=False),
    Case(T=25, H=24, E=3, K=2, I=20, routing="one"),
    Case(T=25, H=24, E=4, K=2, I=20, routing="nobody", packed=False),
    Case(T=25, H=24, E=4, K=1, I=20, routing="nobody"),
    Case(T=20, H=32, E=4, K=2, I=16, strided=True),
    Case(T=12, H=40, E=3, K=2, I=24, dtype=torch.float16),
]
CHECKS = [a_second_time, tiles_of_the_table, only_what_is_needed, weights_in_16_bits, saved_product, no_tokens]
CHECKS += [rows_of_other_ranks, gathered_rows, without_a_backward_pass, sorting]


def named_checks() -> dict:
    return {str(case): (lambda case=case: compare(case)) for case in CASES} | {c.__name__: c for c in CHECKS}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # This fills what is only allocated with NaN: nothing of it may be read.
    torch.use_deterministic_algorithms(True)
    for name, function in named_checks().items():
        try:
            function()
        except Exception:
            print(json.dumps([name, traceback.format_exc()]), flush=True)
        else:
            print(json.dumps([name, None]), flush=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
