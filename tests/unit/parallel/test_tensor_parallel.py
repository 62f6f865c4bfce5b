"""What AutoTP is told to cut, and who counts which gradient; real engines: `distributed/test_tensor_parallel.py`."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from deepspeed.module_inject.autotp_config import AutoTPConfig
from deepspeed.utils import groups
from small import deepspeed_json, small_config
from torch import nn

from moe_hf import MoEForCausalLM
from moe_hf.parallel.tensor_parallel import clip_by_all_experts, is_split, num_copies, with_split_plan

# A process group stands for its ranks here.
TENSOR, DATA, ALL = [2, 3], [1, 3], [0, 1, 2, 3]


def tensor_json(zero: int = 2, ep: int | None = 2) -> dict:
    return deepspeed_json(zero, ep, tensor_parallel={"autotp_size": 2})


@pytest.fixture
def group(monkeypatch):
    monkeypatch.setattr(groups, "_TENSOR_MODEL_PARALLEL_GROUP", TENSOR)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda ranks: ranks)


def test_the_json_gets_a_plan_and_a_copy():
    config = tensor_json() | {"train_batch_size": 8}
    before = copy.deepcopy(config)
    planned = with_split_plan(config)
    assert config == before
    assert planned["train_batch_size"] == "auto" and planned["tensor_parallel"]["autotp_size"] == 2
    plain = deepspeed_json(2, 2)
    assert with_split_plan(plain) is plain


@pytest.mark.parametrize("changes", [{}, {"attention_gate": "headwise", "attention_bias": True, "use_qk_norm": False}])
def test_the_plan_cuts_what_transformers_own_plan_cuts(changes):
    """But for the experts, which belong to AutoEP."""
    specs = AutoTPConfig.from_dict(with_split_plan(tensor_json())["tensor_parallel"]["partition_config"])
    config = small_config(**changes)
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    styles = {"colwise": ("column", False), "rowwise": ("row", False), "replicated_with_grad_allreduce": ("skip", True)}
    found, wanted = {}, {}
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            continue
        if (spec := specs.find_matching_spec(f"{name}.weight")) is not None:
            found[name] = spec.partition_type.value, spec.grad_allreduce
        pattern = ".".join("*" if part.isdigit() else part for part in name.removeprefix("model.").split("."))
        if (style := config.base_model_tp_plan.get(pattern)) is not None:
            wanted[name] = styles[style]
    assert found == wanted
    assert len(found) == 4 * (4 + 2 * config.use_qk_norm + bool(config.attention_gate)) + 4 * 3


def test_whole_parameters_are_held_by_every_rank_of_a_group(group):
    whole, cut, expert = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    cut.tensor_model_parallel = True
    expert.allreduce = False
    assert [num_copies(param) for param in (whole, cut, expert)] == [2, 1, 1]
    assert [is_split(param) for param in (whole, cut, expert)] == [False, True, False]
    # ZeRO 3 slices over data-parallel ranks, and what was made inside `zero.Init` over all.
    whole.ds_process_group = DATA
    assert num_copies(whole) == 2
    whole.ds_process_group = ALL
    assert num_copies(whole) == 1


def test_without_tensor_parallelism_there_are_no_copies():
    assert num_copies(nn.Parameter(torch.zeros(2))) == 1


class Optimizer:
    """Counts as ZeRO 1 and 2 do: what is not cut, on the first rank only."""

    model_parallel_rank = 1

    def get_grad_norm_direct(self, gradients, params, norm_type=2):
        """Return the norm that this rank adds."""
        assert norm_type == 2
        if self.model_parallel_rank:
            gradients = gradients[:0]
        return sum(float(gradient.norm()) for gradient in gradients)


@pytest.mark.parametrize(("zero", "ep", "counts"), [(1, 2, True), (2, 4, True), (3, 2, False), (2, None, False)])
def test_experts_of_every_rank_count(zero, ep, counts):
    engine = SimpleNamespace(optimizer=Optimizer())
    clip_by_all_experts(engine, tensor_json(zero, ep))
    dense, expert = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    expert.allreduce = False
    gradients = [torch.tensor([3.0, 4.0])]
    assert engine.optimizer.get_grad_norm_direct(gradients, [expert]) == (5.0 if counts else 0.0)
    assert engine.optimizer.get_grad_norm_direct(gradients, [dense]) == 0.0
    assert engine.optimizer.get_grad_norm_direct([], []) == 0.0
    assert engine.optimizer.model_parallel_rank == 1


def test_the_rank_is_put_back_after_an_error():
    engine = SimpleNamespace(optimizer=Optimizer())
    clip_by_all_experts(engine, tensor_json())
    expert = nn.Parameter(torch.zeros(2))
    expert.allreduce = False
    with pytest.raises(AssertionError):
        engine.optimizer.get_grad_norm_direct([], [expert], norm_type=3)
    assert engine.optimizer.model_parallel_rank == 1
