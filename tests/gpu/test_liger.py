"""One GPU with Liger installed: its kernels compute what our own code does, and a step never waits for the device."""

import json

import pytest
import torch
from launching import ROOT, deepspeed
from small import flags, make_rows, recipe, save_small_model

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.liger_cross_entropy import has_fused_losses
from moe_hf.linear_cross_entropy import LossTerms, summed_losses, token_losses
from moe_hf.training.liger import LigerKernels, use_liger_kernels

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [(0.0, 0.0), (0.1, 1e-3)])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_and_gradients_are_those_of_float64(dtype, terms, fused):
    torch.manual_seed(0)
    hidden_states = torch.randn(1500, 64, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(50304, 64, device="cuda").to(dtype).requires_grad_()
    labels = torch.randint(50304, (1500,), device="cuda")
    labels[::7] = -100
    assert has_fused_losses(weight), "Liger is installed, and its kernel the one that is known"
    loss, _ = summed_losses(hidden_states, weight, labels, LossTerms(*terms, fused=fused))
    (loss / 1000).backward()
    inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden_states, weight)]
    logits = inputs[0] @ inputs[1].t()
    ce = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=terms[0], reduction="sum")
    expected = ce + terms[1] * logits.logsumexp(-1)[labels != -100].square().sum()
    (expected / 1000).backward()
    precision = 1e-5 if dtype == torch.float32 else 1e-2
    assert abs(loss.item() - expected.item()) <= precision * expected.item()
    for tensor, reference in zip((hidden_states, weight), inputs, strict=True):
        assert (tensor.grad - reference.grad).norm() <= precision * reference.grad.norm()
    by_token, _ = token_losses(hidden_states, weight, labels, LossTerms(*terms, fused=fused))
    torch.testing.assert_close(by_token.sum(), loss.detach(), rtol=1e-5, atol=0.0)


def model_of(dtype: torch.dtype) -> MoEForCausalLM:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_qk_norm": True, "rope_parameters": rope}
    experts = {"num_experts": 8, "first_k_dense_replace": 1, "shared_expert_intermediate_size": 96}
    config = MoEConfig(**sizes, **heads, **experts, initializer_range=0.1)
    return MoEForCausalLM._from_config(config).cuda().to(dtype).train()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_activations_and_rotations_compute_the_same(dtype):
    expected, model = model_of(dtype), model_of(dtype)
    assert use_liger_kernels(model, LigerKernels()) > 10
    expected.lm_head.fused = False
    ids = torch.randint(512, (2, 64), device="cuda")
    for each in (expected, model):
        each(ids, labels=ids, skip_logits=True).loss.backward()
    theirs = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        if dtype == torch.float32:
            assert (parameter.grad - theirs[name].grad).norm() <= 1e-3 * theirs[name].grad.norm(), name
        else:
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("with_liger", [False, True])
def test_a_step_waits_nowhere_for_the_device(with_liger):
    model, ids = model_of(torch.bfloat16), torch.randint(512, (4, 64), device="cuda")
    if with_liger:
        use_liger_kernels(model, LigerKernels())
    model.lm_head.fused = with_liger
    counts = {name: torch.tensor(252, device="cuda") for name in ("num_items_in_batch", "num_tokens_in_batch")}

    def step() -> None:
        model(ids, labels=ids, skip_logits=True, output_router_statistics=True, **counts).loss.backward()

    step()  # compiles what is compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_flag_trains(tmp_path):
    save_small_model(tmp_path / "model", head_dim=32)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(24)))
    words = flags(
        recipe([]),
        ranks=1,
        model_name_or_path=tmp_path / "model",
        train_file=rows,
        output_dir=tmp_path / "out",
        deepspeed=ROOT / "ds_configs" / "zero3_ep.json",
        expert_parallel_size=1,
        bf16=True,
        use_liger_kernel=True,
        label_smoothing_factor=0.1,
    )
    done = deepspeed(1, ROOT / "run_clm_moe.py", *words, on_cpu=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    losses = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in losses if "loss" in entry]
    assert len(losses) == 6 and all(torch.tensor(losses).isfinite())
