"""Float8 layers compute what the formula says, run in whole trainings, and leave everything else as it was."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT
from safetensors.torch import load_file
from small import small_config
from transformers.utils.import_utils import enable_tf32

from moe_hf import MoEForCausalLM
from moe_hf.errors import ConfigError
from moe_hf.parallel.failure import FailureRelay
from moe_hf.parallel.float8 import check_float8_supported, convert_to_float8
from moe_hf.training import precision_arguments
from moe_hf.training.arguments import MoETrainingArguments
from moe_hf.training.run import build_trainer, execute

STEPS = 50
SIZES = (
    "vocab_size=512,hidden_size=64,intermediate_size=128,moe_intermediate_size=48,num_hidden_layers=2,"
    "num_attention_heads=4,num_key_value_heads=2,head_dim=16,max_position_embeddings=64,num_experts=4,"
    "shared_expert_intermediate_size=32,shared_expert_gate=True"
)
IN_LAYER = [f"self_attn.{letter}_proj" for letter in "qkvo"]
IN_MLP = ["gate_proj", "up_proj", "down_proj"]


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scale the largest element to the largest float8, round every element, and scale back."""
    scale = torch.finfo(dtype).max / tensor.float().abs().max()
    return (tensor.float() * scale).to(dtype).float() / scale


def one_layer(in_features: int = 32, out_features: int = 48) -> tuple[MoEForCausalLM, torch.nn.Linear]:
    """Return a model with converted layers and one of them, with weights of that shape."""
    model = MoEForCausalLM(small_config(hidden_size=in_features, intermediate_size=out_features))
    convert_to_float8(model)
    return model, model.model.layers[0].mlp.up_proj


def test_products_are_those_of_rounded_operands():
    _, layer = one_layer()
    x, upstream = torch.randn(3, 5, 32, requires_grad=True), torch.randn(3, 5, 48)
    y = layer(x)
    y.backward(upstream)

    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    inputs, weight, gradient = rounded(x, e4m3), rounded(layer.weight, e4m3), rounded(upstream, e5m2)
    torch.testing.assert_close(y, inputs @ weight.T)
    torch.testing.assert_close(x.grad, gradient @ weight)
    torch.testing.assert_close(layer.weight.grad, gradient.flatten(0, 1).T @ inputs.flatten(0, 1))
    # Eight bits are few: the plain product is near, but not the same.
    plain = x @ layer.weight.T
    assert 1e-3 < (y - plain).norm() / plain.norm() < 0.1


def test_only_attention_and_dense_mlps_are_converted():
    model = MoEForCausalLM(small_config())
    before = {name: id(param) for name, param in model.named_parameters()}
    converted = convert_to_float8(model)
    assert {name: id(param) for name, param in model.named_parameters()} == before
    layers = [f"model.layers.{n}.{name}" for n in range(4) for name in IN_LAYER]
    dense = [f"model.layers.{n}.mlp.{name}" for n in (0, 2) for name in IN_MLP]
    shared = [f"model.layers.{n}.mlp.shared_experts.{name}" for n in (1, 3) for name in IN_MLP]
    assert sorted(converted) == sorted(layers + dense + shared)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert [name for name in linear if name not in converted] == [
        f"model.layers.{n}.mlp.shared_experts_gate" for n in (1, 3)
    ] + ["lm_head"]


def test_layers_of_other_sizes_stay_as_they_are():
    model = MoEForCausalLM(small_config(intermediate_size=40, shared_expert_intermediate_size=24))
    assert not any(".mlp." in name for name in convert_to_float8(model))
    with pytest.raises(ConfigError, match="multiples of 16"):
        convert_to_float8(MoEForCausalLM(small_config(hidden_size=24, head_dim=6)))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_weight_that_zero3_has_released_is_read_again_in_the_backward_pass(checkpointed):
    """As ZeRO-3 does it: the parameter is empty between the passes, and its data lies elsewhere in the second one."""
    _, layer = one_layer()
    layer.weight.ds_id, layer.checkpointed = 0, checkpointed
    x = torch.randn(4, 32, requires_grad=True)
    y = layer(x)
    gathered_again = 3 * layer.weight.data
    layer.weight.data = torch.empty(0)
    layer.weight.data = gathered_again
    y.sum().backward()
    once = rounded(torch.ones(4, 48), torch.float8_e5m2) @ rounded(gathered_again / 3, torch.float8_e4m3fn)
    torch.testing.assert_close(x.grad, once if checkpointed else 3 * once)


def test_autocast_decides_the_dtype():
    _, layer = one_layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 32)).dtype == torch.bfloat16
    assert layer(torch.randn(2, 32)).dtype == torch.float32


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Folder with this package's own source to train on, in which both runs find one tokenizer."""
    folder = tmp_path_factory.mktemp("float8")
    sources = sorted((ROOT / "moe_hf").glob("*.py"))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": path.read_text()}) + "\n" for path in sources))
    return folder


def train(folder: Path, name: str, **changes) -> tuple[list[float], int]:
    """Train on a small text; return the losses and how often float8 layers ran."""
    words = {
        "config_name": "quickstart",
        "config_overrides": SIZES,
        "output_dir": folder / name,
        "cache_dir": folder / "cache",
        "train_file": folder / "text.jsonl",
        "validation_split_percentage": 0,
        "block_size": 64,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "warmup_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "do_train": True,
        "use_cpu": True,
        "bf16": True,
    } | changes
    trainer = build_trainer([f"--{key}={value}" for key, value in words.items()], FailureRelay())
    calls = []
    for module in trainer.model.modules():
        if type(module).__name__ == "MoEFloat8Linear":
            module.register_forward_hook(lambda *_: calls.append(1))
    execute(trainer)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], len(calls)


def test_after_50_steps_the_loss_is_that_of_bf16(cache, no_state_of_earlier_runs):
    bf16, calls_of_bf16 = train(cache, "bf16")
    fp8, calls = train(cache, "fp8", fp8=True)
    # 4 of attention and 3 of the MLP or the shared expert, in both layers.
    assert (calls_of_bf16, calls) == (0, STEPS * 2 * 7)
    assert fp8 != bf16 and bf16[-1] < bf16[0] - 0.5
    assert all(math.isclose(a, b, rel_tol=0.02) for a, b in zip(fp8, bf16, strict=True))
    weights = [load_file(cache / name / "hf" / "model.safetensors") for name in ("bf16", "fp8")]
    described = [{name: (tensor.shape, tensor.dtype) for name, tensor in each.items()} for each in weights]
    assert described[0] == described[1]
    configs = [json.loads((cache / name / "hf" / "config.json").read_text()) for name in ("bf16", "fp8")]
    assert configs[0] == configs[1]


def test_gradient_checkpointing_changes_nothing(cache, no_state_of_earlier_runs):
    plain, _ = train(cache, "plain", fp8=True, max_steps=3)
    recomputed, calls = train(cache, "recomputed", fp8=True, max_steps=3, gradient_checkpointing=True)
    assert recomputed == plain
    # Recomputation ends with the last tensor that it needs.
    assert 3 * 2 * 7 < calls <= 2 * 3 * 2 * 7


def test_what_cannot_run_is_one_sentence(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="add --bf16"):
        MoETrainingArguments(output_dir=str(tmp_path), fp8=True)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"moe_hf\[fp8\]"):
        MoETrainingArguments(output_dir=str(tmp_path), fp8=True, bf16=True)


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((10, 0), True)])
def test_gpus_without_matrix_units_for_8_bits_are_refused(monkeypatch, capability, runs):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Accelerator X")
    if runs:
        check_float8_supported()
    else:
        with pytest.raises(ConfigError, match=rf"Accelerator X has {capability[0]}\.{capability[1]}"):
            check_float8_supported()


def test_tf32_needs_a_gpu_and_is_said_in_both_ways_of_torch(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"^--tf32 True needs an NVIDIA GPU of Ampere or newer; leave it out\.$"):
        MoETrainingArguments(output_dir=str(tmp_path), tf32=True)
    monkeypatch.setattr(precision_arguments, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    try:
        MoETrainingArguments(output_dir=str(tmp_path), tf32=True)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        # Raises where the older way says something else; inductor asks it.
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32
    finally:
        enable_tf32(False)
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = "none"
