"""`MoEConfig` says in one sentence what is wrong, and survives the trip through JSON."""

import json
import math

import pytest
from helpers_model import TINY, tiny_config
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from moe_hf import MoEConfig, MoEForCausalLM

NAN, INF = math.nan, math.inf

# The setting, and what the sentence must contain: the field, and the value as the user would write it.
BAD_SETTINGS = [
    ({"vocab_size": 0}, "vocab_size=0"),
    ({"hidden_size": 30}, "hidden_size=30", "num_attention_heads=4"),
    ({"intermediate_size": 0}, "intermediate_size=0"),
    ({"moe_intermediate_size": -8}, "moe_intermediate_size=-8"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
    ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3", "num_attention_heads=4"),
    ({"num_key_value_heads": 8}, "num_key_value_heads=8", "num_attention_heads=4"),
    ({"head_dim": 7}, "head_dim=7"),
    ({"head_dim": 0}, "head_dim=0"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'", "'silu'"),
    ({"attention_dropout": 1.0}, "attention_dropout=1.0"),
    ({"hidden_dropout": 1.0}, "hidden_dropout=1.0"),
    ({"attention_dropout": -0.1}, "attention_dropout=-0.1"),
    ({"attention_dropout": NAN}, "attention_dropout=nan"),
    ({"qk_norm_scope": "layer"}, "qk_norm_scope='layer'", "'full'"),
    ({"attention_gate": "channelwise"}, "attention_gate='channelwise'", "'headwise'"),
    ({"num_experts": -1}, "num_experts=-1"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok=0", "num_experts=4"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok=5", "num_experts=4"),
    ({"mlp_layer_types": ["sparse"]}, "mlp_layer_types has 1", "num_hidden_layers=2"),
    ({"mlp_layer_types": ["sparse", "moe"]}, "mlp_layer_types", "'moe'"),
    ({"mlp_layer_types": ["sparse", "sparse"], "decoder_sparse_step": 2}, "decoder_sparse_step=2", "mlp_layer_types=["),
    ({"mlp_layer_types": ["sparse", "dense"], "num_experts": 0}, "mlp_layer_types", "num_experts=0"),
    ({"moe_layer_indices": [2]}, "moe_layer_indices=[2]", "num_hidden_layers=2"),
    ({"moe_layer_indices": [-1]}, "moe_layer_indices=[-1]"),
    ({"moe_layer_indices": [1, 1]}, "moe_layer_indices=[1, 1]"),
    ({"moe_layer_indices": [1], "decoder_sparse_step": 2}, "moe_layer_indices=[1]", "decoder_sparse_step=2"),
    ({"moe_layer_indices": [1], "first_k_dense_replace": 1}, "moe_layer_indices=[1]", "first_k_dense_replace=1"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
    ({"first_k_dense_replace": 3}, "first_k_dense_replace=3", "num_hidden_layers=2"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1"),
    ({"shared_expert_intermediate_size": -16}, "shared_expert_intermediate_size=-16"),
    ({"shared_expert_gate": True}, "shared_expert_gate=True", "shared_expert_intermediate_size"),
    ({"routed_scaling_factor": 0.0}, "routed_scaling_factor=0.0"),
    ({"routed_scaling_factor": INF}, "routed_scaling_factor=inf"),
    ({"router_aux_loss_coef": NAN}, "router_aux_loss_coef=nan"),
    ({"router_aux_loss_coef": -0.01}, "router_aux_loss_coef=-0.01"),
    ({"router_aux_loss_scope": "node"}, "router_aux_loss_scope='node'", "'local'"),
    ({"router_z_loss_coef": INF}, "router_z_loss_coef=inf"),
    ({"scoring_func": "relu"}, "scoring_func='relu'", "'sigmoid'"),
    ({"router_balancing": "bias"}, "router_balancing='bias'", "'loss_free'"),
    ({"router_bias_update_speed": -0.1}, "router_bias_update_speed=-0.1"),
    ({"router_bias_update_speed": NAN}, "router_bias_update_speed=nan"),
    ({"n_group": 0}, "n_group=0", "num_experts=4"),
    ({"n_group": 3}, "n_group=3", "num_experts=4"),
    ({"topk_group": 0}, "topk_group=0", "n_group=1"),
    ({"n_group": 2, "topk_group": 3}, "topk_group=3", "n_group=2"),
    ({"n_group": 2, "group_scoring_func": "mean"}, "group_scoring_func='mean'", "'top2_sum'"),
    ({"n_group": 4, "topk_group": 2}, "top2_sum", "n_group=4", "num_experts=4"),
    ({"n_group": 2, "num_experts_per_tok": 3}, "num_experts_per_tok=3", "the 2 experts", "topk_group=1", "n_group=2"),
    ({"initializer_range": -0.02}, "initializer_range=-0.02"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
    ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type='spiral'", "yarn"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters", "factor"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_parameters", "low_freq_factor"),
]


def ids_of(rows: list) -> list[str]:
    return [", ".join(f"{k}={v}" for k, v in row[0].items()) for row in rows]


def check_sentence(error: Exception, fragments: tuple[str, ...]) -> None:
    message = str(error)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("row", BAD_SETTINGS, ids=ids_of(BAD_SETTINGS))
def test_a_bad_setting_is_refused_in_one_sentence(row):
    changes, *fragments = row
    with pytest.raises(ValueError) as caught:
        tiny_config(**changes)
    check_sentence(caught.value, tuple(fragments))


# Settings that Transformers itself lets pass, or refuses under another name.
SETTINGS_TRANSFORMERS_TOLERATES = [
    ({"hidden_size": 0}, "hidden_size=0"),
    ({"num_hidden_layers": -1}, "num_hidden_layers=-1 must"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "factor"),
    ({"rope_parameters": {"rope_type": "linear", "factor": -2.0}}, "factor"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fst": 32.0}}, "beta_fst"),
    ({"rope_theta": 0.0}, "rope_theta"),
    ({"rope_theta": NAN}, "rope_theta"),
    ({"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ({"pad_token_id": 61}, "pad_token_id=61", "vocab_size=61"),
    ({"num_experts": 0, "moe_layer_indices": [0]}, "moe_layer_indices=[0]", "num_experts=0"),
    ({"num_experts": 4, "decoder_sparse_step": 7}, "num_experts=4 but no layer is sparse", "decoder_sparse_step=7"),
    ({"num_experts": 4, "moe_layer_indices": []}, "num_experts=4 but no layer is sparse", "moe_layer_indices=[]"),
    ({"num_experts": 0, "shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8", "num_experts=0"),
    ({"head_dim": 6, "partial_rotary_factor": 0.1}, "partial_rotary_factor=0.1", "head_dim=6"),
    ({"num_experts": 4, "num_local_experts": 8}, "num_local_experts=8", "num_experts=4"),
]


@pytest.mark.parametrize("row", SETTINGS_TRANSFORMERS_TOLERATES, ids=ids_of(SETTINGS_TRANSFORMERS_TOLERATES))
def test_a_setting_that_transformers_tolerates_is_refused(row):
    changes, *fragments = row
    with pytest.raises(ValueError) as caught:
        tiny_config(**changes)
    check_sentence(caught.value, tuple(fragments))


@pytest.mark.parametrize(
    "field, value",
    [("hidden_size", "64"), ("num_experts", True), ("num_experts_per_tok", 2.0), ("mlp_layer_types", "sparse")],
)
def test_a_wrong_type_is_refused_with_field_and_value(field, value):
    with pytest.raises(StrictDataclassFieldValidationError) as caught:
        tiny_config(**{field: value})
    assert f"Field '{field}'" in str(caught.value) and repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("num_expert", "num_experts"),
        ("router_aux_loss_coeff", "router_aux_loss_coef"),
        ("moe_intermediate_dim", "moe_intermediate_size"),
        ("zzz", None),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_field(key, nearest):
    with pytest.raises(ValueError) as caught:
        tiny_config(**{key: 3})
    check_sentence(caught.value, (f"{key}=3", f"did you mean {nearest}?" if nearest else "see MoEConfig"))


def test_the_keys_transformers_adds_are_accepted():
    config = tiny_config(
        dtype="bfloat16",
        architectures=["MoEForCausalLM"],
        auto_map={"AutoConfig": "configuration_moe.MoEConfig"},
        attn_implementation="eager",
        rope_theta=500.0,
        partial_rotary_factor=0.5,
        num_labels=2,
    )
    assert config.rope_parameters == {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_type": "default"}


def test_fields_left_out_are_derived():
    config = MoEConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96)
    assert config.moe_intermediate_size == 96
    assert config.num_key_value_heads == 4
    assert config.head_dim == 16
    assert config.num_sparse_layers == config.num_hidden_layers == 16


@pytest.mark.parametrize("attention_bias", [True, False])
@pytest.mark.parametrize("output_bias", [True, False, None])
def test_the_output_projection_has_its_own_bias(attention_bias, output_bias, tmp_path):
    config = tiny_config(attention_bias=attention_bias, attention_output_bias=output_bias)
    expected = attention_bias if output_bias is None else output_bias
    assert config.attention_output_bias is expected
    config.save_pretrained(tmp_path)
    assert MoEConfig.from_pretrained(tmp_path).attention_output_bias is expected
    attention = MoEForCausalLM(config).model.layers[0].self_attn
    assert (attention.o_proj.bias is not None) == expected
    assert [p.bias is not None for p in (attention.q_proj, attention.k_proj, attention.v_proj)] == [attention_bias] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"n_group": 2, "topk_group": 2},
        {"n_group": 2, "topk_group": 1},
        {"n_group": 4, "topk_group": 2, "group_scoring_func": "max"},
        # One group is no group, and an expert alone is enough for it.
        {"num_experts": 1, "num_experts_per_tok": 1},
    ],
    ids=str,
)
def test_groups_that_hold_enough_experts_are_accepted(changes):
    assert tiny_config(**changes).topk_group == changes.get("topk_group", 1)


def test_a_config_written_before_there_were_groups_means_what_it_meant():
    config = tiny_config()
    assert (config.scoring_func, config.n_group, config.topk_group, config.router_balancing) == (
        "softmax",
        1,
        1,
        "aux_loss",
    )


def test_head_dim_need_not_divide_the_hidden_size():
    assert tiny_config(hidden_size=30, head_dim=6).head_dim == 6


# "s" is a sparse layer, "d" a dense one.
LAYER_TYPES = [
    ({}, "ssssss"),
    ({"decoder_sparse_step": 2}, "dsdsds"),
    ({"decoder_sparse_step": 3}, "ddsdds"),
    ({"first_k_dense_replace": 1}, "dsssss"),
    ({"first_k_dense_replace": 2, "decoder_sparse_step": 2}, "dddsds"),
    ({"moe_layer_indices": [4, 0]}, "sdddsd"),
    ({"mlp_layer_types": ["dense", "dense", "sparse", "sparse", "dense", "sparse"]}, "ddssds"),
    ({"mlp_layer_types": ["dense", "sparse"] * 3, "decoder_sparse_step": 2}, "dsdsds"),
    ({"num_experts": 0}, "dddddd"),
]


@pytest.mark.parametrize("changes, expected", LAYER_TYPES, ids=ids_of(LAYER_TYPES))
def test_shorthands_say_which_layers_are_sparse(changes, expected):
    config = tiny_config(num_hidden_layers=6, **changes)
    assert [t[0] for t in config.mlp_layer_types] == list(expected)
    assert config.num_sparse_layers == expected.count("s")


def test_the_model_builds_the_layers_that_the_config_names():
    model = MoEForCausalLM(tiny_config(num_hidden_layers=4, moe_layer_indices=[1, 2]))
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [False, True, True, False]


def test_a_dense_model_needs_no_valid_router_settings():
    config = tiny_config(num_experts=0, num_experts_per_tok=2)
    names = [name for name, _ in MoEForCausalLM(config).named_parameters()]
    assert config.num_sparse_layers == 0
    assert not [name for name in names if "experts" in name or ".mlp.gate." in name]


ROUND_TRIPS = [
    {},
    {"num_experts": 0},
    {"first_k_dense_replace": 1},
    {"moe_layer_indices": [1]},
    {"mlp_layer_types": ["sparse", "dense"]},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
    {"use_qk_norm": True, "qk_norm_scope": "full"},
    {"scoring_func": "sigmoid", "n_group": 2, "router_balancing": "loss_free", "router_bias_update_speed": 0},
    {"attention_bias": True, "attention_output_bias": False},
    {"attention_gate": "headwise", "shared_expert_intermediate_size": 16, "shared_expert_gate": True},
    {"eos_token_id": [1, 2], "pad_token_id": 0, "tie_word_embeddings": True, "dtype": "bfloat16"},
]


@pytest.mark.parametrize("changes", ROUND_TRIPS, ids=str)
def test_json_round_trip(changes, tmp_path):
    config = tiny_config(**changes)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "moe_hf"
    assert set(TINY) <= set(written)
    for loaded in (MoEConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is MoEConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert loaded.base_model_tp_plan == config.base_model_tp_plan
        for field in MoEConfig.__dataclass_fields__:
            if field not in ("transformers_version", "architectures"):
                assert getattr(loaded, field) == getattr(config, field), field
    MoEConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == written


def test_an_error_in_a_file_is_found_on_loading(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for changes, *fragments in (
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ({"router_z_loss_coeff": 0.1}, "router_z_loss_coeff=0.1", "did you mean router_z_loss_coef?"),
        # As JSON's writers put it when a loss coefficient went wrong.
        ({"router_aux_loss_coef": NAN}, "router_aux_loss_coef=nan"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**written, **changes}))
        with pytest.raises(ValueError) as caught:
            MoEConfig.from_pretrained(tmp_path)
        check_sentence(caught.value, tuple(fragments))


def test_a_setting_spoiled_afterwards_is_not_saved(tmp_path):
    config = tiny_config()
    config.num_experts_per_tok = 9
    with pytest.raises(Exception, match="num_experts_per_tok=9 must be between 1 and num_experts=4"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("changes", [{"num_experts_per_tok": 9}, {"router_z_loss_coef": NAN}], ids=str)
def test_an_override_on_loading_is_validated_before_the_model_is_built(changes, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError):
        MoEForCausalLM(MoEConfig.from_pretrained(tmp_path, **changes))


def test_a_copy_with_more_layers_needs_its_own_layer_types():
    values = tiny_config(first_k_dense_replace=1).to_dict() | {"num_hidden_layers": 4}
    with pytest.raises(ValueError, match="mlp_layer_types has 2 entries but num_hidden_layers=4"):
        MoEConfig(**values)
    deeper = MoEConfig(**(values | {"mlp_layer_types": None}))
    assert deeper.mlp_layer_types == ["dense", "sparse", "sparse", "sparse"]


def test_num_local_experts_is_another_name_of_num_experts():
    base = {k: v for k, v in TINY.items() if k != "num_experts"}
    config = MoEConfig(**base, num_local_experts=6)
    assert config.num_experts == config.num_local_experts == 6
    assert MoEForCausalLM(config).model.layers[0].mlp.gate.weight.shape == (6, 32)


def test_num_local_experts_of_zero_is_a_dense_model():
    base = {k: v for k, v in TINY.items() if k != "num_experts"}
    assert MoEConfig(**base, num_local_experts=0).num_sparse_layers == 0


def test_tensor_parallel_plan_follows_the_norm():
    per_head = tiny_config(use_qk_norm=True).base_model_tp_plan
    full = tiny_config(use_qk_norm=True, qk_norm_scope="full").base_model_tp_plan
    assert per_head["layers.*.self_attn.q_proj"] == "colwise"
    assert per_head["layers.*.self_attn.o_proj"] == "rowwise"
    # A norm over all heads needs the whole projection on every rank.
    assert full["layers.*.self_attn.q_proj"] == "colwise_gather_output"
    assert full["layers.*.self_attn.o_proj"] == "rowwise_split_input"
    assert not [name for name in full if name.endswith("_norm")]
    assert tiny_config().base_model_tp_plan == MoEConfig.base_model_tp_plan
