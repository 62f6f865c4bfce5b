"""Liger's norms, activations and rotations: they compute what ours do, and what cannot be is refused."""

from importlib.util import find_spec

import liger_twin
import pytest
import torch
from helpers_model import tiny_model

from moe_hf import MoEForCausalLM
from moe_hf.errors import ConfigError
from moe_hf.language_head import LanguageHead
from moe_hf.modeling_moe import MoEAttention, MoEMLP, MoERMSNorm
from moe_hf.training import liger
from moe_hf.training.arguments import MoETrainingArguments
from moe_hf.training.liger import LigerKernels, use_liger_kernels

MODELS = {
    "plain": {},
    "norms of heads": {"use_qk_norm": True, "attention_bias": True},
    "norms over heads": {"use_qk_norm": True, "qk_norm_scope": "full", "attention_gate": "elementwise"},
    "part of a head": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "dense and shared": {"first_k_dense_replace": 1, "shared_expert_intermediate_size": 24, "shared_expert_gate": True},
}


@pytest.fixture
def installed(monkeypatch) -> None:
    liger_twin.install(monkeypatch, **liger_twin.ELEMENTWISE)


def run(model: MoEForCausalLM) -> dict[str, torch.Tensor]:
    """Return the loss, all hidden states and all gradients."""
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(3))
    output = model(ids, labels=ids, skip_logits=True, output_hidden_states=True)
    output.loss.backward()
    results = {"loss": output.loss.detach()}
    results |= {f"state {i}": state.detach() for i, state in enumerate(output.hidden_states)}
    return results | {name: parameter.grad for name, parameter in model.named_parameters()}


def model_of(changes: dict, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> MoEForCausalLM:
    model = tiny_model(**changes).to(dtype).train()
    model.model.rotary_emb.compute_frequencies()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_gradients_are_the_same(installed, kind, checkpointing):
    expected = run(model_of(MODELS[kind], checkpointing=checkpointing))
    model = model_of(MODELS[kind], checkpointing=checkpointing)
    num_modules = sum(isinstance(m, (MoERMSNorm, MoEMLP, MoEAttention)) for m in model.modules())
    names = set(model.state_dict())
    assert use_liger_kernels(model, LigerKernels()) == num_modules > 4
    assert set(model.state_dict()) == names
    for name, value in run(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_in_16_bits_too(installed):
    kind = MODELS["dense and shared"] | MODELS["norms of heads"]
    expected, model = run(model_of(kind, torch.bfloat16)), model_of(kind, torch.bfloat16)
    use_liger_kernels(model, LigerKernels())
    for name, value in run(model).items():
        assert value.dtype == expected[name].dtype
        assert (value - expected[name]).float().norm() <= 3e-2 * expected[name].float().norm(), name


@pytest.mark.parametrize("left_out", ["rms_norm", "swiglu", "rope"])
def test_each_kernel_can_be_left_out(installed, left_out):
    model = model_of(MODELS["dense and shared"])
    use_liger_kernels(model, LigerKernels(**{left_out: False}))
    kinds = {"rms_norm": MoERMSNorm, "swiglu": MoEMLP, "rope": MoEAttention}
    for name, kind in kinds.items():
        changed = {bool({"forward", "_rotate"} & set(vars(m))) for m in model.modules() if type(m) is kind}
        assert changed == {name != left_out}, name


@pytest.mark.parametrize("used", [True, False])
def test_the_loss_can_be_left_to_our_own_chunks(installed, used):
    model = model_of({})
    use_liger_kernels(model, LigerKernels(fused_linear_cross_entropy=used))
    assert isinstance(model.lm_head, LanguageHead) and model.lm_head.fused == used


def arguments(tmp_path, **flags) -> MoETrainingArguments:
    return MoETrainingArguments(output_dir=str(tmp_path), use_liger_kernel=True, **flags)


@pytest.fixture
def with_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(liger, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"liger_kernel_config": '{"layer_norm": true}'}, "layer_norm=True; there are rms_norm, swiglu, rope, fused_"),
        ({"liger_kernel_config": {"rope": "no"}}, "rope=no; .* each true or false"),
        ({"liger_kernel_config": "rope=false"}, "must be JSON, like '{\"rope\": false}'"),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, "give one"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, with_a_gpu, flags, message):
    with pytest.raises(ConfigError, match=message):
        arguments(tmp_path, **flags)


def test_it_needs_a_gpu_and_the_package(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="needs a GPU"):
        arguments(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_spec("liger_kernel") is None
    with pytest.raises(ConfigError, match=r"pip install 'moe_hf\[liger\]'"):
        arguments(tmp_path)
