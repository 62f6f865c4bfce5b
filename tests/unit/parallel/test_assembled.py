"""Weights put together from what every rank sends, with ranks that are made up."""

import pytest
import torch
from small import small_config
from torch import nn

from moe_hf import MoEForCausalLM
from moe_hf.parallel import assembled
from moe_hf.parallel.assembled import assembled_weights


class Shared(nn.Module):
    """What AutoEP makes of a sparse block, as far as names go: a router and one rank's experts."""

    def __init__(self, block: nn.Module, rank: int, size: int) -> None:
        super().__init__()
        self.ep_rank = rank
        self.router, self.experts = block.gate, nn.Module()
        gate, up = block.experts.gate_up_proj.detach().chunk(size)[rank].chunk(2, dim=1)
        down = block.experts.down_proj.detach().chunk(size)[rank]
        for name, tensor in (("w1", gate), ("w3", up), ("w2", down)):
            setattr(self.experts, name, nn.Parameter(tensor.clone()))
        self.shared_experts, self.shared_experts_gate = block.shared_experts, block.shared_experts_gate


def as_on_rank(rank: int, size: int) -> MoEForCausalLM:
    torch.manual_seed(5)
    model = MoEForCausalLM(small_config())
    for layer in model.model.layers[1::2]:
        layer.mlp = Shared(layer.mlp, rank % size, size)
    return model


def test_one_process():
    model = MoEForCausalLM(small_config())
    whole = assembled_weights(model)
    assert whole.keys() == model.state_dict().keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("num_ranks", "ep_size"), [(2, 2), (4, 2), (4, 4)])
def test_experts_over_ranks(num_ranks, ep_size, monkeypatch):
    torch.manual_seed(5)
    expected = MoEForCausalLM(small_config()).state_dict()
    sent = []
    monkeypatch.setattr(assembled, "_exchange", lambda own: sent.append(own) or [own])
    for rank in range(1, num_ranks):
        monkeypatch.setattr(assembled, "rank", lambda: 1)
        assert assembled_weights(as_on_rank(rank, ep_size)) is None
    monkeypatch.setattr(assembled, "rank", lambda: 0)
    monkeypatch.setattr(assembled, "_exchange", lambda own: [own, *sent])
    whole = assembled_weights(as_on_rank(0, ep_size))
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in expected.items())


def test_buffers_that_differ_are_an_error(monkeypatch):
    config = small_config(scoring_func="sigmoid", router_balancing="loss_free")
    model = MoEForCausalLM(config)

    def exchange(own):
        name = next(iter(own[2]))
        return [own, (*own[:2], own[2] | {name: own[2][name] + 1})]

    monkeypatch.setattr(assembled, "_exchange", exchange)
    with pytest.raises(RuntimeError, match="different buffers"):
        assembled_weights(model)
