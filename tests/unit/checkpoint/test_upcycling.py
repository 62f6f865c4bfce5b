"""An upcycled folder: the same logits where they are promised, the weights as they must be, whole or not there."""

import dataclasses
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import save_tokenizer, small_config
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.checkpoint.export import export_model
from moe_hf.checkpoint.upcycling import Copy, Drop, Granular, Noise, UpcyclingRecipe, upcycle, write
from moe_hf.errors import CheckpointError, ConfigError

TOKENS = torch.arange(3, 123).reshape(4, 30)
DENSE = {
    "num_experts": 0,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 0,
    "shared_expert_gate": False,
}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5)  # norms begin as ones and biases as zeros
    return model.eval()


def save_dense(folder: Path, dtype=torch.float32, max_shard_size: str = "5GB", **changes) -> MoEForCausalLM:
    model = randomize(MoEForCausalLM(small_config(**(DENSE | changes)))).to(dtype)
    export_model(model, folder, max_shard_size=max_shard_size)
    return model


def read_files(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def load(folder: Path, dtype: str | torch.dtype = "auto") -> MoEForCausalLM:
    model, info = MoEForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def assert_same_logits(sparse: torch.nn.Module, dense: torch.nn.Module) -> None:
    expected = logits(dense)
    assert expected.std() > 0.1
    assert (logits(sparse) - expected).abs().max() <= 1e-5


# --------------------------------------------------------------------------------------------------------------------
# The same logits


@pytest.mark.parametrize("layers", ["all", "every-2", "0,3"])
@pytest.mark.parametrize(
    ("method", "num_experts", "num_experts_per_tok"),
    [
        (Copy(), 4, 2),
        (Copy(), 7, 1),
        (Copy(), 3, 3),
        (Granular(2), 8, 2),
        (Granular(2), 8, 6),
        (Granular(3), 12, 6),
        (Granular(4), 4, 4),
        (Granular(8), 32, 8),
    ],
)
def test_logits_are_those_of_the_dense_model(tmp_path, method, num_experts, num_experts_per_tok, layers):
    dense = save_dense(tmp_path / "dense", intermediate_size=96)
    recipe = UpcyclingRecipe(method, num_experts, num_experts_per_tok, layers)
    config = upcycle(tmp_path / "dense", tmp_path / "moe", recipe)
    sparse = load(tmp_path / "moe")
    assert_same_logits(sparse, dense)
    # By way of experts, of which several have been chosen.
    kinds = ["sparse" if hasattr(layer.mlp, "experts") else "dense" for layer in sparse.model.layers]
    assert kinds == config.mlp_layer_types and "sparse" in kinds
    index = sparse(TOKENS, output_router_logits=True).router_logits[0].topk(num_experts_per_tok).indices
    assert len(index.unique()) > num_experts_per_tok or num_experts == num_experts_per_tok


@pytest.mark.parametrize("method", [Copy(), Granular(4)])
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"attention_bias": True, "attention_output_bias": False, "use_qk_norm": False},
        {"qk_norm_scope": "full"},
        {"attention_gate": "headwise"},
        {"router_balancing": "loss_free"},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}},
        {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-3},
        {"norm_topk_prob": False, "routed_scaling_factor": 3.0, "scoring_func": "sigmoid"},
    ],
)
def test_every_kind_of_dense_model_keeps_its_logits(tmp_path, method, changes):
    dense = save_dense(tmp_path / "dense", **changes)
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcyclingRecipe(method, 8, 4))
    assert_same_logits(load(tmp_path / "moe"), dense)


NATIVE = {
    "llama": (LlamaConfig, {"attention_bias": True}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
}


@pytest.mark.parametrize("method", [Copy(), Granular(3)])
@pytest.mark.parametrize("architecture", NATIVE)
def test_models_of_other_architectures_keep_their_logits(tmp_path, architecture, method):
    config_class, changes = NATIVE[architecture]
    config = config_class(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **changes,
    )
    dense = randomize(AutoModelForCausalLM.from_config(config))
    dense.save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcyclingRecipe(method, 6, 3, router_std=0.02))
    assert_same_logits(load(tmp_path / "moe"), dense)


@pytest.mark.parametrize("granularity", [2, 4])
def test_scaling_by_a_power_of_two_is_exact_in_16_bits(tmp_path, granularity):
    save_dense(tmp_path / "dense", dtype=torch.bfloat16)
    recipe = UpcyclingRecipe(Granular(granularity), 8, 4)
    upcycle(tmp_path / "dense", tmp_path / "moe", recipe)
    assert load(tmp_path / "moe").dtype == torch.bfloat16
    # What remains is the rounding of the arithmetic, not of the weights.
    assert_same_logits(load(tmp_path / "moe", torch.float32), load(tmp_path / "dense", torch.float32))


# --------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize("method", [Copy(), Noise(), Granular(2), Drop()])
def test_what_is_no_expert_is_bit_equal(tmp_path, method):
    save_dense(tmp_path / "dense", attention_bias=True)
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcyclingRecipe(method, 4, 2, "1,2"))
    before, after = read_files(tmp_path / "dense"), read_files(tmp_path / "moe")
    gone = {f"model.layers.{i}.mlp.{p}_proj.weight" for i in (1, 2) for p in ("gate", "up", "down")}
    parts = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    new = {f"model.layers.{i}.mlp.{part}" for i in (1, 2) for part in parts}
    assert before.keys() - after.keys() == gone and after.keys() - before.keys() == new
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - gone)


@pytest.mark.parametrize("method", [Copy(), Noise(0.3, 0.4), Drop(0.25)])
def test_experts_are_gate_above_up_and_down_of_each(tmp_path, method):
    save_dense(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcyclingRecipe(method, 4, 2))
    before, after = read_files(tmp_path / "dense"), read_files(tmp_path / "moe")
    for layer in range(4):
        mlp = f"model.layers.{layer}.mlp"
        gate_up, down = after[f"{mlp}.experts.gate_up_proj"], after[f"{mlp}.experts.down_proj"]
        assert gate_up.shape == (4, 96, 32) and down.shape == (4, 32, 48)
        for expert in range(4):
            changes = [
                gate_up[expert, :48] != before[f"{mlp}.gate_proj.weight"],
                gate_up[expert, 48:] != before[f"{mlp}.up_proj.weight"],
                (down[expert] != before[f"{mlp}.down_proj.weight"]).T,
            ]
            if isinstance(method, Drop):
                # Twelve of 48 units, the same in all three.
                assert all(change.all(dim=1).sum() == change.any(dim=1).sum() == 12 for change in changes)
                assert torch.equal(changes[0], changes[1]) and torch.equal(changes[0], changes[2])
            else:
                share = 0.4 if isinstance(method, Noise) else 0.0
                assert all(change.float().mean().item() == pytest.approx(share, abs=0.05) for change in changes)


def test_router_is_drawn_with_the_deviation_of_the_model_or_of_the_recipe(tmp_path):
    save_dense(tmp_path / "dense", num_hidden_layers=2)
    for std in (None, 0.01):
        recipe = UpcyclingRecipe(Copy(), 64, 2, router_std=std)
        upcycle(tmp_path / "dense", tmp_path / f"moe{std}", recipe)
        files = read_files(tmp_path / f"moe{std}")
        routers = [files[f"model.layers.{i}.mlp.gate.weight"] for i in (0, 1)]
        for router in routers:
            assert router.std().item() == pytest.approx(std or 0.15, rel=0.06)
            assert router.mean().abs().item() < 0.1 * (std or 0.15)
        assert torch.corrcoef(torch.stack([r.flatten() for r in routers]))[0, 1].abs() < 0.1


def test_correction_biases_are_zeros_in_float32(tmp_path):
    save_dense(tmp_path / "dense", router_balancing="loss_free")
    recipe = UpcyclingRecipe(Copy(), 4, 2)
    upcycle(tmp_path / "dense", tmp_path / "moe", recipe, dtype=torch.bfloat16)
    bias = read_files(tmp_path / "moe")["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, torch.zeros(4)) and bias.dtype == torch.float32


@pytest.mark.parametrize("method", [Copy(), Noise(), Granular(3), Drop()])
def test_shards_of_either_side_change_no_bit(tmp_path, method):
    recipe = UpcyclingRecipe(method, 6, 3, seed=5)
    torch.manual_seed(1)
    save_dense(tmp_path / "whole")
    torch.manual_seed(1)
    save_dense(tmp_path / "sharded", max_shard_size="5KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 10
    upcycle(tmp_path / "whole", tmp_path / "a", recipe)
    torch.manual_seed(2)
    upcycle(tmp_path / "sharded", tmp_path / "b", recipe, max_shard_size="50KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    a, b = read_files(tmp_path / "a"), read_files(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    load(tmp_path / "b")


@pytest.mark.parametrize("method", [Noise(), Drop()])
def test_seed_decides_and_the_choice_of_layers_does_not(tmp_path, method):
    save_dense(tmp_path / "dense")
    recipe = UpcyclingRecipe(method, 4, 2)
    others = {
        "again": recipe,
        "seed": dataclasses.replace(recipe, seed=1),
        "layers": dataclasses.replace(recipe, layers="2"),
    }
    upcycle(tmp_path / "dense", tmp_path / "first", recipe)
    first = read_files(tmp_path / "first")
    for name, other in others.items():
        upcycle(tmp_path / "dense", tmp_path / name, other)
        files = read_files(tmp_path / name)
        for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            tensor = f"model.layers.2.mlp.{part}"
            assert torch.equal(files[tensor], first[tensor]) == (name != "seed")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_dtype_is_that_of_the_model_or_the_one_asked_for(tmp_path, dtype):
    save_dense(tmp_path / "dense", dtype=torch.bfloat16 if dtype is None else torch.float32)
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcyclingRecipe(Drop(), 4, 2), dtype=dtype)
    wanted = dtype or torch.bfloat16
    assert {tensor.dtype for tensor in read_files(tmp_path / "moe").values()} == {wanted}
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    assert load(tmp_path / "moe").dtype == wanted


def test_tied_embeddings_are_written_once(tmp_path):
    save_dense(tmp_path / "dense", tie_word_embeddings=True)
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcyclingRecipe(Copy(), 4, 2))
    assert "lm_head.weight" not in read_files(tmp_path / "moe")
    model = load(tmp_path / "moe")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_folder_is_a_whole_model_of_moe_hf(tmp_path):
    save_dense(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    GenerationConfig(max_new_tokens=7, eos_token_id=1).save_pretrained(tmp_path / "dense")
    returned = upcycle(tmp_path / "dense", tmp_path / "moe", UpcyclingRecipe(Copy(), 4, 2, "every-2"))
    config = MoEConfig.from_pretrained(tmp_path / "moe")
    assert config.mlp_layer_types == returned.mlp_layer_types == ["dense", "sparse", "dense", "sparse"]
    assert config.architectures == ["MoEForCausalLM"]
    for name in ("modeling_moe.py", "configuration_moe.py", "routing.py"):
        assert (tmp_path / "moe" / name).is_file()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "moe" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "moe")("w5 w9").input_ids == [5, 9]
    assert load(tmp_path / "moe").generation_config.max_new_tokens == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_weights_are_held_no_longer_than_their_tensor_is_made(tmp_path, monkeypatch):
    save_dense(tmp_path / "dense")
    alive, most, names, open_model = weakref.WeakSet(), [], [], write.open_model

    class Held(torch.Tensor):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    def open_watched(model):
        source = open_model(model)

        def read(name: str) -> torch.Tensor:
            most.append(len(alive))
            names.append(name)
            tensor = source.read(name).as_subclass(Held)
            if ".mlp." in name:  # others are written as they are, and belong to the shard
                alive.add(tensor)
            return tensor

        return dataclasses.replace(source, read=read)

    monkeypatch.setattr(write, "open_model", open_watched)
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcyclingRecipe(Copy(), 4, 2), max_shard_size="20KB")
    # When a dense matrix is read, at most the one before it is still there.
    assert len(most) == len(names) > 30 and max(most) <= 1
    assert len(set(names)) == len(names)
    assert not alive


# --------------------------------------------------------------------------------------------------------------------
# It trains


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("method", [Copy(), Noise(), Granular(4), Drop()])
def test_every_expert_that_a_token_visits_gets_a_gradient(tmp_path, method, implementation):
    save_dense(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcyclingRecipe(method, 8, 4, "every-2"))
    model = load(tmp_path / "moe").train()
    model.set_experts_implementation(implementation)
    output = model(TOKENS, labels=TOKENS, output_router_logits=True)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    for layer, router_logits in zip((1, 3), output.router_logits, strict=True):
        visited = torch.zeros(8, dtype=torch.bool)
        visited[router_logits.topk(4).indices.flatten()] = True
        assert visited.sum() > 4
        mlp = model.model.layers[layer].mlp
        for parameter in (mlp.experts.gate_up_proj, mlp.experts.down_proj):
            assert torch.equal(parameter.grad.flatten(1).any(dim=1), visited)
        assert (mlp.gate.weight.grad.abs().sum(dim=1) > 0).all()


def test_copies_and_groups_part_in_the_first_step(tmp_path):
    for method in (Copy(), Granular(2)):
        save_dense(tmp_path / f"dense{method}")
        recipe = UpcyclingRecipe(method, 4, 2, "0")
        upcycle(tmp_path / f"dense{method}", tmp_path / f"moe{method}", recipe)
        model = load(tmp_path / f"moe{method}").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        mlp = model.model.layers[0].mlp
        for weight in (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj):
            pairs = [(a, b) for a in range(4) for b in range(a)]
            assert all(not torch.equal(weight[a], weight[b]) for a, b in pairs)


# --------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_an_output_that_is_there_stays_as_it_is(tmp_path):
    save_dense(tmp_path / "dense")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "kept.txt").write_text("kept")
    with pytest.raises(ConfigError, match="is already there; give a new folder"):
        upcycle(tmp_path / "dense", tmp_path / "moe", UpcyclingRecipe(Copy(), 4, 2))
    assert [path.name for path in (tmp_path / "moe").iterdir()] == ["kept.txt"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()}
    with pytest.raises(ConfigError, match="is already there; give a new folder"):
        upcycle(tmp_path / "dense", tmp_path / "dense", UpcyclingRecipe(Copy(), 4, 2))
    assert {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()} == before


def test_nothing_is_left_of_what_failed(tmp_path, monkeypatch):
    save_dense(tmp_path / "dense")
    with pytest.raises(ConfigError):
        upcycle(tmp_path / "dense", tmp_path / "moe", UpcyclingRecipe(Granular(5), 10, 5))
    with pytest.raises(CheckpointError):
        upcycle(tmp_path / "nothing", tmp_path / "moe", UpcyclingRecipe(Copy(), 4, 2))

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_model_files", fail)
    with pytest.raises(CheckpointError, match=r"moe could not be written: .* No space left on device\."):
        upcycle(tmp_path / "dense", tmp_path / "moe", UpcyclingRecipe(Copy(), 4, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path):
    model = MoEForCausalLM(small_config(**DENSE))
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = 20_000.0  # fits into float16, but not four times
    export_model(model, tmp_path / "dense")
    options = {"dtype": torch.float16}
    upcycle(tmp_path / "dense", tmp_path / "copy", UpcyclingRecipe(Copy(), 8, 4), **options)
    with pytest.raises(CheckpointError) as error:
        upcycle(tmp_path / "dense", tmp_path / "granular", UpcyclingRecipe(Granular(4), 8, 4), **options)
    assert str(error.value) == (
        "model.layers.1.mlp.experts.down_proj holds values that are not finite in torch.float16; use another --dtype."
    )
    model.model.norm.weight.data[0] = 1e5
    export_model(model, tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"^model\.norm\.weight holds values that are not finite"):
        upcycle(tmp_path / "dense", tmp_path / "granular", UpcyclingRecipe(Copy(), 8, 4), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "dense"]


def test_upcycling_twice_is_refused(tmp_path):
    save_dense(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", UpcyclingRecipe(Copy(), 4, 2, "every-2"))
    with pytest.raises(ConfigError) as error:
        upcycle(tmp_path / "moe", tmp_path / "again", UpcyclingRecipe(Copy(), 8, 2))
    assert str(error.value) == "The model already has 4 experts in 2 layers; upcycling starts from a dense one."
