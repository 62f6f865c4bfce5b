"""The small model has the structure of the large one, and its tokens know where they go."""

import pytest
import torch

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.doctor.twin import make_rows, shortened, twin_of, write_twin
from moe_hf.presets import preset_names, read_preset

KEPT = (
    "num_experts",
    "num_experts_per_tok",
    "scoring_func",
    "router_balancing",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_aux_loss_scope",
    "shared_expert_gate",
    "use_qk_norm",
    "qk_norm_scope",
    "norm_topk_prob",
    "tie_word_embeddings",
)


@pytest.mark.parametrize("name", preset_names())
def test_the_twin_of_every_preset(name):
    config = MoEConfig(**read_preset(name))
    twin = twin_of(config)
    assert {field: getattr(twin, field) for field in KEPT} == {field: getattr(config, field) for field in KEPT}
    assert twin.mlp_layer_types == config.mlp_layer_types[: len(twin.mlp_layer_types)] and twin.num_hidden_layers <= 6
    assert set(twin.mlp_layer_types) == set(config.mlp_layer_types)
    heads = (
        twin.num_attention_heads / twin.num_key_value_heads,
        config.num_attention_heads / config.num_key_value_heads,
    )
    assert heads[0] == heads[1]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in MoEForCausalLM(twin).parameters()) < 6_000_000


def test_nothing_is_left_to_chance():
    config = MoEConfig(attention_dropout=0.1, hidden_dropout=0.2, router_jitter_noise=0.3)
    twin = twin_of(config)
    assert twin.attention_dropout == twin.hidden_dropout == twin.router_jitter_noise == 0.0


@pytest.mark.parametrize(
    ("kinds", "most", "expected"),
    [
        (["dense", "sparse"], 6, ["dense", "sparse"]),
        (["dense"] * 3 + ["sparse"] * 9, 4, ["dense"] * 3 + ["sparse"]),
        (["dense"] * 8 + ["sparse"], 4, ["dense"] * 3 + ["sparse"]),
    ],
)
def test_shorter_models_keep_every_kind_of_layer(kinds, most, expected):
    assert shortened(kinds, most) == expected


def test_a_pipeline_has_a_layer_for_each_stage():
    assert twin_of(MoEConfig(num_hidden_layers=16), least_layers=8).num_hidden_layers == 8


@pytest.mark.parametrize("name", ["quickstart", "qwen3-30b-a3b"])
def test_tokens_point_clearly_to_experts_and_loads_are_unequal(name, tmp_path):
    twin = twin_of(MoEConfig(**read_preset(name)))
    write_twin(twin, tmp_path)
    model = MoEForCausalLM.from_pretrained(tmp_path)
    rows = make_rows(16, twin.vocab_size)
    k, loads = twin.num_experts_per_tok, torch.zeros(twin.num_experts)
    for row in rows:
        output = model(torch.tensor([row["input_ids"]]), output_router_logits=True)
        for logits in output.router_logits:
            ranked = logits.sort(dim=-1, descending=True)
            # A thousand times what rounding moves a logit by.
            assert (ranked.values[:, k - 1] - ranked.values[:, k]).min() > 1e-3
            loads += torch.bincount(ranked.indices[:, :k].flatten(), minlength=twin.num_experts)
    assert loads.max() > 1.5 * loads.mean()


def test_the_same_twin_in_every_process(tmp_path):
    twin = twin_of(MoEConfig(**read_preset("quickstart")))
    for seed, folder in ((1, "a"), (2, "b")):
        torch.manual_seed(seed)
        write_twin(twin, tmp_path / folder)
        assert torch.initial_seed() == seed
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("a", "b")]
    assert files[0] == files[1]


def test_rows_are_uneven_and_partly_masked():
    rows = make_rows(8, 100)
    assert len({len(row["input_ids"]) for row in rows}) > 3
    assert any(row["labels"][0] == -100 for row in rows) and all(row["labels"][-1] != -100 for row in rows)
    assert max(token for row in rows for token in row["input_ids"]) < 100
    assert all(len(row["input_ids"]) % 8 == 0 for row in make_rows(8, 100, multiple_of=8))
