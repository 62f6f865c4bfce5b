"""A step of training waits nowhere for the device: no value of a tensor is read by Python, no result has its size.

The kernel of the experts that a CPU has reads how many rows each of them got. That of a GPU must not, so that here the
Python around its Triton kernels runs as it is, and only these are not started.
"""

import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import wraps
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from helpers_model import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from moe_hf import MoEForCausalLM
from moe_hf.kernels import dispatch, experts

# Operators that need a value on the host: a scalar itself, or the size of their result.
READING = {"_local_scalar_dense", "nonzero", "unique_dim", "_unique", "_unique2", "unique_consecutive"}
READING |= {"masked_select", "bincount", "equal", "is_nonzero", "_assert_async"}
MODELS = {
    "softmax": {},
    "sigmoid, loss free": {"scoring_func": "sigmoid", "router_balancing": "loss_free"},
    "groups": {"num_experts": 8, "n_group": 4, "topk_group": 2},
    "sinkhorn": {"router_balancing": "sinkhorn"},
    "expert choice": {"router_balancing": "expert_choice"},
    "capacity": {"expert_capacity_factor": 1.0},
    "capacity by position": {"expert_capacity_factor": 1.0, "token_drop_policy": "position"},
    "sequences, noise": {"router_aux_loss_scope": "sequence", "router_jitter_noise": 0.1},
    "shared": {"shared_expert_intermediate_size": 24, "shared_expert_gate": True, "first_k_dense_replace": 1},
    "attention": {"use_qk_norm": True, "attention_gate": "headwise", "attention_dropout": 0.1, "hidden_dropout": 0.1},
    "z-loss of predictions": {"output_z_loss_coef": 1e-4},
}


class HostReads(TorchDispatchMode):
    """Notes for each operator that would wait for a GPU which functions have called it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[str]] = []

    def __enter__(self):
        HostReads.current = self
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith(("index", "_index_put")) and any(
            torch.is_tensor(one) and one.dtype in (torch.bool, torch.uint8)
            for one in (args[1] if len(args) > 1 and isinstance(args[1], (tuple, list)) else [])
        )
        by_counts = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in READING or by_mask or by_counts:
            self.found.append([name, *(frame.name for frame in traceback.extract_stack())])
        # Inside an operator of ours autograd has not taken apart what consists of others, such as `item`.
        with self:
            result = function.decompose(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {})) if result is NotImplemented else result


@pytest.fixture(autouse=True)
def no_lists(monkeypatch):
    """On a CPU these read memory without an operator, or have nothing to do."""
    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, name=name: pytest.fail(f"Tensor.{name}"))


@pytest.fixture
def launches(monkeypatch) -> Iterator[list[str]]:
    """Let our operators take the kernels of a GPU, which are not started; give the names of those that would be."""
    if find_spec("triton") is None:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            pytest.skip("Triton has no wheels for this platform")
        pytest.fail("Triton is missing: pip install -e '.[test]'")
    from triton.runtime.jit import JITFunction

    from moe_hf.kernels import experts_triton

    names = []

    def start(self, *args, grid, warmup, **kwargs):
        assert all(type(size) is int for size in grid) and not any(torch.is_tensor(size) for size in kwargs.values())
        names.append(self.fn.__name__)

    monkeypatch.setattr(JITFunction, "run", start)
    functions = ("sort_by_expert", "forward", "backward", "gather_rows", "sum_rows", "dot_rows")
    backend = SimpleNamespace(**{name: looked_at(getattr(experts_triton, name)) for name in functions})
    for module in (experts, dispatch):
        monkeypatch.setattr(module, "backend_of", lambda tensor: backend)
    # What no kernel writes is NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield names
    torch.use_deterministic_algorithms(False)


def looked_at(function: Callable) -> Callable:
    """Note what an operator of ours does inside too: PyTorch calls it without the mode that has noted the operator."""

    @wraps(function)
    def inside(*args, **kwargs):
        with HostReads.current:
            return function(*args, **kwargs)

    return inside


def reads_of_a_step(changes: dict, kernel: str = "grouped_mm", **inputs: torch.Tensor) -> list[list[str]]:
    torch.manual_seed(0)
    settings = {"attn_implementation": "sdpa", "experts_implementation": kernel}
    model = MoEForCausalLM._from_config(tiny_config(**changes), **settings).train()
    ids = torch.randint(61, (2, 16))
    counts = {"num_items_in_batch": torch.tensor(30), "num_tokens_in_batch": torch.tensor(32)}
    options = {"use_cache": False, "skip_logits": True, "output_router_statistics": True, "label_smoothing": 0.1}
    with HostReads() as reads:
        model(ids, labels=ids, **inputs, **counts, **options).loss.backward()
    return reads.found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_forward_and_backward_read_nothing(kind, packed):
    documents = torch.cat([torch.arange(7), torch.arange(9)]).expand(2, -1)
    assert reads_of_a_step(MODELS[kind], **({"position_ids": documents} if packed else {})) == []


@pytest.mark.parametrize("kind", MODELS)
def test_nor_do_our_experts_on_a_gpu(kind, launches):
    assert reads_of_a_step(MODELS[kind], "moe_hf") == []
    names = {"_count", "_place", "_cut", "_gate_and_up", "_down"}
    names |= {"_activation_gradient", "_input_gradient", "_weight_gradient", "_sum_parts"}
    # A row that an expert has chosen is summed with no other one.
    assert {*launches} == names | ({"_sum_rows"} if kind != "expert choice" else set())


def test_nor_does_what_goes_to_other_ranks(launches):
    hidden_states, weights = torch.randn(6, 8, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    with HostReads() as reads:
        order = experts.sort_by_expert(torch.randint(4, (6, 2)), 4)
        rows = dispatch.gather_rows(hidden_states, order)
        dispatch.sum_rows(rows, weights, order).sum().backward()
    assert reads.found == [] and {"_gather_rows", "_sum_rows", "_dot_with_rows"} <= {*launches}


def test_with_padding_only_transformers_looks_whether_there_is_any():
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 12:] = 0
    reads = reads_of_a_step({}, attention_mask=mask)
    assert 0 < len(reads) <= 2 and all("create_causal_mask" in functions for _, *functions in reads)


def test_a_read_is_seen():
    values = torch.arange(4.0)
    looks = [
        lambda: values.sum().item(),
        lambda: bool((values > 1).any()),
        lambda: values[values > 1],
        lambda: torch.where(values > 1),
        lambda: values.long().bincount(),
        lambda: torch.equal(values, values + 1),
        lambda: values.repeat_interleave(torch.tensor([1, 2, 0, 1])),
    ]
    for look in looks:
        with HostReads() as reads:
            look()
        assert reads.found
