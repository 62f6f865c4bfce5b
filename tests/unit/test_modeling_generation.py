"""Inference: what the model computes, caches, padding, packing, saving, loading and generating."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers_model import assert_close, random_ids, reference_logits, rope_frequencies, tiny_config, tiny_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from moe_hf import MoEConfig, MoEForCausalLM, MoEModel


def generate(model: MoEForCausalLM, input_ids: torch.Tensor, **options) -> torch.Tensor:
    """Generate 8 tokens greedily; the explicit mask keeps `generate` from taking a token of the prompt as padding."""
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(input_ids, **{"attention_mask": torch.ones_like(input_ids), **options})


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


# --------------------------------------------------------------------------------------------------------------------
# Every option against the slow reference

LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llama3_frequencies() -> list[float]:
    """Return the frequencies of Llama 3.1: long waves are stretched by the factor, short ones kept, some blended."""
    frequencies = []
    for frequency in rope_frequencies(8):
        wavelength = 2 * torch.pi / frequency
        blend = min(max((32 / wavelength - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        frequencies.append(blend * frequency + (1 - blend) * frequency / 8.0)
    return frequencies


# The change against the tiny model, and the RoPE frequencies where they are not the usual ones.
OPTIONS = {
    "linear_rope": ({"rope_parameters": LINEAR_ROPE}, [f / 4 for f in rope_frequencies(8)]),
    "llama3_rope": ({"rope_parameters": LLAMA3_ROPE}, llama3_frequencies()),
    "partial_rotary": ({"partial_rotary_factor": 0.5}, rope_frequencies(4)),
    "partial_rotary_linear": ({"rope_parameters": {**LINEAR_ROPE, "partial_rotary_factor": 0.5}}, [0.25, 0.0025]),
    "rope_theta": ({"rope_theta": 100.0}, rope_frequencies(8, 100.0)),
    "gate_headwise": ({"attention_gate": "headwise"}, None),
    "gate_elementwise": ({"attention_gate": "elementwise"}, None),
    "qk_norm_head": ({"use_qk_norm": True}, None),
    "qk_norm_full": ({"use_qk_norm": True, "qk_norm_scope": "full"}, None),
    "attention_bias": ({"attention_bias": True}, None),
    "shared_expert": ({"shared_expert_intermediate_size": 16}, None),
    "shared_expert_gated": ({"shared_expert_intermediate_size": 16, "shared_expert_gate": True}, None),
    "unnormalized_top_k": ({"norm_topk_prob": False}, None),
    "scaled_routing": ({"routed_scaling_factor": 2.5}, None),
    "one_expert_per_token": ({"num_experts_per_tok": 1}, None),
    "norm_epsilon": ({"rms_norm_eps": 0.3}, None),
}


def test_the_plain_model_equals_the_reference():
    model = tiny_model()
    input_ids = random_ids(1, 9)
    assert_close(model(input_ids).logits[0], reference_logits(model, input_ids[0].tolist()))


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_equals_the_reference_and_changes_the_output(option):
    changes, frequencies = OPTIONS[option]
    model, plain = tiny_model(**changes), tiny_model()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    input_ids = random_ids(1, 9)
    logits = model(input_ids).logits
    assert_close(logits[0], reference_logits(model, input_ids[0].tolist(), frequencies))
    assert (logits - plain(input_ids).logits).abs().max() > 0.05


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3, "first_k_dense_replace": 1},
        {"num_experts": 0},
        {"hidden_size": 36, "head_dim": 6, "num_attention_heads": 4, "num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"num_experts": 7, "num_experts_per_tok": 7},
    ],
    ids=str,
)
def test_other_shapes_equal_the_reference(changes):
    model, input_ids = tiny_model(**changes), random_ids(1, 9)
    assert_close(model(input_ids).logits[0], reference_logits(model, input_ids[0].tolist()))


@pytest.mark.parametrize("rope_type", ["yarn", "linear", "llama3", "dynamic"])
def test_rope_scalings_survive_saving_and_generate(rope_type, tmp_path):
    parameters = {
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "linear": LINEAR_ROPE,
        "llama3": LLAMA3_ROPE,
        "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    }[rope_type]
    model, plain = tiny_model(rope_parameters=dict(parameters), max_position_embeddings=16), tiny_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    input_ids = random_ids(1, 24)
    assert_close(loaded(input_ids).logits, model(input_ids).logits)
    assert not torch.allclose(loaded(input_ids).logits, plain(input_ids).logits, atol=1e-2)
    assert generate(loaded, input_ids).shape == (1, 32)


# --------------------------------------------------------------------------------------------------------------------
# Caches and generation


@pytest.mark.parametrize("chunks", [(1,) * 9, (4, 1, 3, 1), (9,)], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_feeding_piece_by_piece_equals_feeding_at_once(attention, chunks):
    model, input_ids = tiny_model(), random_ids(2, 9)
    model.set_attn_implementation(attention)
    cache, pieces = DynamicCache(config=model.config), []
    for piece in input_ids.split(chunks, dim=1):
        pieces.append(model(piece, past_key_values=cache).logits)
    assert cache.get_seq_length() == 9
    assert_close(torch.cat(pieces, dim=1), model(input_ids, use_cache=False).logits)


def test_the_cache_is_returned_unless_refused():
    model, input_ids = tiny_model(), random_ids(1, 5)
    assert model(input_ids).past_key_values.get_seq_length() == 5
    assert model(input_ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": 0.5}], ids=str)
def test_generation_with_a_cache_equals_generation_without(search):
    model, input_ids = tiny_model(), random_ids(2, 6)
    cached = generate(model, input_ids, use_cache=True, **search)
    assert cached.shape == (2, 14)
    assert torch.equal(cached, generate(model, input_ids, use_cache=False, **search))


def test_greedy_generation_takes_the_best_token_of_the_reference():
    model, input_ids = tiny_model(), random_ids(1, 4)
    generated = generate(model, input_ids)[0].tolist()
    logits = reference_logits(model, generated[:-1])
    assert generated[4:] == logits[3:].argmax(dim=-1).tolist()


def test_a_static_cache_equals_a_dynamic_one():
    model, input_ids = tiny_model(), random_ids(2, 6)
    assert torch.equal(generate(model, input_ids, cache_implementation="static"), generate(model, input_ids))
    static = StaticCache(config=model.config, max_cache_len=16)
    pieces = [model(piece, past_key_values=static).logits for piece in input_ids.split((4, 1, 1), dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(input_ids, use_cache=False).logits)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_does_not_change_the_continuation(attention, use_cache):
    model = tiny_model(pad_token_id=0)
    model.set_attn_implementation(attention)
    prompts = [random_ids(1, length, seed=length)[0] for length in (3, 7, 5)]
    input_ids = torch.zeros(3, 7, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, -len(prompt) :] = prompt
        attention_mask[row, -len(prompt) :] = 1
    together = generate(model, input_ids, attention_mask=attention_mask, use_cache=use_cache)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt[None])
        assert together[row, 7:].tolist() == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_right_padding_does_not_change_the_logits(attention):
    model, input_ids = tiny_model(), random_ids(2, 9)
    model.set_attn_implementation(attention)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = 0
    logits = model(input_ids, attention_mask=attention_mask).logits
    assert_close(logits[1, :5], model(input_ids[1:, :5]).logits[0])


def test_logits_to_keep():
    model, input_ids = tiny_model(), random_ids(2, 9)
    full = model(input_ids).logits
    assert full.shape == (2, 9, 61)
    for kept, expected in ((1, full[:, -1:]), (4, full[:, -4:]), (torch.tensor([0, 7]), full[:, [0, 7]])):
        torch.testing.assert_close(model(input_ids, logits_to_keep=kept).logits, expected)


def test_inputs_embeds_stand_in_for_input_ids():
    model, input_ids = tiny_model(), random_ids(2, 6)
    inputs_embeds = model.model.embed_tokens(input_ids)
    assert torch.equal(model(inputs_embeds=inputs_embeds).logits, model(input_ids).logits)
    generated = model.generate(
        inputs_embeds=inputs_embeds, attention_mask=torch.ones(2, 6), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert torch.equal(generated, generate(model, input_ids)[:, 6:])
    for arguments in ({}, {"input_ids": input_ids, "inputs_embeds": inputs_embeds}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**arguments)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    lengths = (4, 1, 7)
    input_ids = random_ids(1, sum(lengths))
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(input_ids, position_ids=position_ids, use_cache=False).logits
    alone = [model(document, use_cache=False).logits for document in input_ids.split(lengths, dim=1)]
    assert_close(packed, torch.cat(alone, dim=1))
    unpacked = model(input_ids, use_cache=False).logits
    assert (packed - unpacked)[:, 4:].abs().max() > 0.1


@pytest.mark.parametrize("padded", [False, True])
def test_flex_attention_equals_sdpa(padded):
    """Run without its compiled kernel, whose build alone takes half a minute."""
    model, input_ids = tiny_model(), random_ids(2, 9)
    attention_mask = torch.ones_like(input_ids)
    if padded:
        attention_mask[0, :3] = 0
    expected = model(input_ids, attention_mask=attention_mask).logits
    model.set_attn_implementation("flex_attention")
    try:
        with torch.compiler.set_stance("force_eager"):
            actual = model(input_ids, attention_mask=attention_mask).logits
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"flex_attention does not run here: {error}")
    assert_close(actual[attention_mask.bool()], expected[attention_mask.bool()])


def test_attentions_and_hidden_states_are_returned_on_request():
    model, input_ids = tiny_model(), random_ids(2, 5)
    model.set_attn_implementation("eager")
    output = model(input_ids, output_attentions=True, output_hidden_states=True)
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 5, 5)] * 2
    for attention in output.attentions:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 4, 5))
        assert not attention.triu(1).any()
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 5, 32)] * 3
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(input_ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm", "moe_hf"])
def test_bfloat16_stays_near_float32(experts):
    model, input_ids = tiny_model(num_experts_per_tok=4), random_ids(2, 9)
    expected = model(input_ids).logits
    model.bfloat16().set_experts_implementation(experts)
    actual = model(input_ids).logits
    assert actual.dtype == torch.bfloat16
    assert_close(actual, expected, 0.05)


# --------------------------------------------------------------------------------------------------------------------
# Saving and loading

ATTENTION_NAMES = {f"self_attn.{x}_proj.weight" for x in "qkvo"}
NORM_NAMES = {"input_layernorm.weight", "post_attention_layernorm.weight"}
SPARSE_SHAPES = {
    "mlp.gate.weight": (4, 32),
    "mlp.experts.gate_up_proj": (4, 48, 32),
    "mlp.experts.down_proj": (4, 32, 24),
}


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_loses_nothing(tied, tmp_path):
    model, input_ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 7)
    model.save_pretrained(tmp_path)

    saved = load_file(tmp_path / "model.safetensors")
    outer = {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    layer = ATTENTION_NAMES | NORM_NAMES | set(SPARSE_SHAPES)
    assert set(saved) == outer | {f"model.layers.{i}.{name}" for i in range(2) for name in layer}
    for name, shape in SPARSE_SHAPES.items():
        assert saved[f"model.layers.1.{name}"].shape == shape

    loaded, info = MoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], problem
    assert_close(loaded(input_ids).logits, model(input_ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_every_optional_weight_is_saved_and_loaded(tmp_path):
    changes = {
        "use_qk_norm": True,
        "attention_bias": True,
        "attention_gate": "elementwise",
        "shared_expert_intermediate_size": 16,
        "shared_expert_gate": True,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
    }
    model, input_ids = tiny_model(**changes), random_ids(2, 7)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(loaded(input_ids).logits, model(input_ids).logits)


def test_auto_classes_know_the_architecture(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is MoEConfig
    assert type(AutoConfig.for_model("moe_hf")) is MoEConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is MoEForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is MoEModel
    assert type(AutoModelForCausalLM.from_config(tiny_config())) is MoEForCausalLM
    base, input_ids = AutoModel.from_pretrained(tmp_path), random_ids(1, 5)
    assert_close(base(input_ids).last_hidden_state, model.model(input_ids).last_hidden_state)


LOAD_ELSEWHERE = """
import sys
sys.modules["moe_hf"] = None
try:
    import moe_hf
except ImportError:
    pass
else:
    raise SystemExit("moe_hf can be imported, so nothing is tested")
import torch
from transformers import AutoModelForCausalLM
folder, input_ids = sys.argv[1], torch.tensor(eval(sys.argv[2]))
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert type(model).__module__.startswith("transformers_modules."), type(model)
output = model(input_ids, labels=input_ids)
generated = model.generate(
    input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=8, do_sample=False, pad_token_id=0
)
torch.save({"logits": output.logits.detach(), "loss": output.loss.detach(), "generated": generated}, sys.argv[3])
"""


def test_a_saved_folder_loads_where_moe_hf_is_not_installed(tmp_path):
    folder, result = tmp_path / "model", tmp_path / "result.pt"
    model, input_ids = tiny_model(shared_expert_intermediate_size=16, first_k_dense_replace=1), random_ids(2, 6)
    model.save_pretrained(folder)
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_moe.MoEConfig"
    assert auto_map["AutoModelForCausalLM"] == "modeling_moe.MoEForCausalLM"
    # -I: neither the working directory nor PYTHONPATH is searched.
    command = [sys.executable, "-I", "-c", LOAD_ELSEWHERE, str(folder), str(input_ids.tolist()), str(result)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"}
    completed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr
    elsewhere, output = torch.load(result), model(input_ids, labels=input_ids)
    torch.testing.assert_close(elsewhere["logits"], output.logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(elsewhere["loss"], output.loss, rtol=1e-6, atol=1e-6)
    assert torch.equal(elsewhere["generated"], generate(model, input_ids))


def test_device_map_auto_loads_the_same_model(tmp_path):
    pytest.importorskip("accelerate")
    model, input_ids = tiny_model(), random_ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    torch.testing.assert_close(loaded(input_ids.to(loaded.device)).logits.cpu(), model(input_ids).logits)


def test_a_device_map_never_splits_a_layer_and_offloading_computes_the_same(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, input_ids = tiny_model(num_hidden_layers=3, tie_word_embeddings=True), random_ids(2, 7)
    model.save_pretrained(tmp_path / "model")
    layer_bytes = sum(4 * p.numel() for p in model.model.layers[0].parameters())
    device_map = accelerate.infer_auto_device_map(
        model,
        max_memory={"cpu": int(2.5 * layer_bytes), "disk": 10**9},
        no_split_module_classes=model._no_split_modules,
    )
    places = {f"model.layers.{i}": device_map.get(f"model.layers.{i}") for i in range(3)}
    # Half of a layer would still have fitted into memory.
    assert set(places.values()) == {"cpu", "disk"}, device_map
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(offloaded(input_ids).logits, model(input_ids).logits)
    assert torch.equal(generate(offloaded, input_ids), generate(model, input_ids))
