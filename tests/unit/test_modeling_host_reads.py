"""A step of training waits nowhere for the device: no value of a tensor is read by Python, no result has its size."""

import traceback

import pytest
import torch
from helpers_model import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from moe_hf import MoEForCausalLM

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

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith(("index", "_index_put")) and any(
            torch.is_tensor(one) and one.dtype in (torch.bool, torch.uint8)
            for one in (args[1] if len(args) > 1 and isinstance(args[1], (tuple, list)) else [])
        )
        by_counts = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in READING or by_mask or by_counts:
            self.found.append([name, *(frame.name for frame in traceback.extract_stack())])
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_lists(monkeypatch):
    """On a CPU these read memory without an operator."""
    for name in ("tolist", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, name=name: pytest.fail(f"Tensor.{name}"))


def reads_of_a_step(changes: dict, **inputs: torch.Tensor) -> list[list[str]]:
    torch.manual_seed(0)
    settings = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
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
