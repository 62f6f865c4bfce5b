"""Who holds how many parameters, and in which groups of the optimizer."""

import pytest
import torch
from small import small_config

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.checkpoint.model_card import active_parameters
from moe_hf.parallel import autoep
from moe_hf.parallel.autoep import split_expert_groups
from moe_hf.parallel.zero_settings import zero_settings
from moe_hf.planning import parameters
from moe_hf.planning.parameters import local_parameters, optimizer_groups
from moe_hf.planning.setting import Setting
from moe_hf.planning.states import share_of, state_amounts
from moe_hf.presets import preset_names, read_preset


def setting(world_size: int = 4, ep_size: int = 0, stage: int = 2, **others) -> Setting:
    zero = zero_settings({"zero_optimization": {"stage": stage}}, 64)
    return Setting(world_size, zero, ep_size, **others)


@pytest.mark.parametrize("name", preset_names())
def test_every_parameter_is_held_by_somebody(name):
    config = MoEConfig(**read_preset(name))
    whole = sum(p.numel for p in local_parameters(config, setting()))
    assert whole == active_parameters(config).total
    if not config.num_experts:
        return
    held = local_parameters(config, setting(ep_size=4))
    experts = sum(p.numel for p in held if p.is_expert)
    assert sum(p.numel for p in held) + 3 * experts == whole
    assert {p.ranks for p in held if p.is_expert} == {1} and {p.ranks for p in held if not p.is_expert} == {4}


def test_groups_are_those_of_the_trainer_and_of_autoep(monkeypatch):
    """The same parameters together, also where experts are too many for one group."""
    for module, name in ((autoep, "_MAX_GROUP_SIZE"), (parameters, "MAX_GROUP_SIZE")):
        assert getattr(module, name) == 178_956_971
        monkeypatch.setattr(module, name, 8000)
    config = small_config(attention_bias=True, num_hidden_layers=8)
    model = MoEForCausalLM(config)
    names = {id(p): name for name, p in model.named_parameters()}
    from transformers import Trainer

    decaying = set(Trainer.get_decay_parameter_names(None, model))
    groups = [[p for n, p in model.named_parameters() if (n in decaying) == decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    split_expert_groups(optimizer, model, 2)
    wanted = [{names[id(p)].partition(".experts.")[0] for p in group["params"]} for group in optimizer.param_groups]
    found = optimizer_groups(config, setting(ep_size=2))
    assert len(wanted) > 4
    assert [{p.name.partition(".experts.")[0] for p in group} for group in found] == wanted
    # AutoEP has routers of its own, which come after what was there before.
    routers = [f"model.layers.{i}.mlp.gate.weight" for i in (1, 3, 5, 7)]
    assert [p.name for p in found[0][-4:]] == routers
    assert sum(p.numel for group in found[2:] for p in group) * 2 == sum(
        p.numel() for group in optimizer.param_groups[2:] for p in group["params"]
    )


def test_shares_are_equal_and_cover_the_group():
    group = optimizer_groups(small_config(), setting(world_size=3))[0]
    shares = [share_of(group, rank) for rank in range(3)]
    numel = sum(p.numel for p in group)
    assert len({share.own for share in shares}) == 1 and 0 <= shares[0].whole - numel < 6
    # Parameters that a border cuts are touched by two.
    assert numel <= sum(share.touched for share in shares) <= numel + 2 * max(p.numel for p in group)
    assert all(share.touched >= share.own - 6 for share in shares)


def test_tensor_parallelism_divides_matrices_only():
    config = small_config()
    whole, half = (local_parameters(config, setting(tp_size=size)) for size in (1, 2))
    divided = {a.name for a, b in zip(whole, half, strict=True) if b.numel * 2 == a.numel}
    same = {a.name for a, b in zip(whole, half, strict=True) if a.numel == b.numel}
    assert divided | same == {p.name for p in whole}
    assert "model.layers.0.self_attn.q_proj.weight" in divided and "model.layers.0.mlp.down_proj.weight" in divided
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in divided
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.gate.weight"} <= same
    assert "model.layers.1.mlp.experts.down_proj" in same and "model.layers.0.input_layernorm.weight" in same
    assert half[0].ranks == 2


@pytest.mark.parametrize(("stage", "offloaded"), [(1, 16), (2, 16), (3, 18)])
def test_offloading_moves_states_to_the_host(stage, offloaded):
    """At ZeRO 3 18 bytes a parameter, as docs/recipes.md has it."""
    section = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    zero = zero_settings({"zero_optimization": section}, 64)
    there = Setting(4, zero)
    amounts = state_amounts(optimizer_groups(small_config(), there), there, 0)
    own = active_parameters(small_config()).total / 4
    host = sum(a.bytes for a in amounts if a.place == "host" and a.kind != "buffers")
    assert host == pytest.approx(offloaded * own, rel=0.05)
    assert not [a for a in amounts if a.place == "gpu" and a.kind == "optimizer"]
