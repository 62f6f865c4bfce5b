"""One GPU, BF16: every shipped JSON trains, exports and generates on CUDA; flash attention where it is installed."""

import json
from importlib.util import find_spec

import pytest
import torch
from launching import ROOT, deepspeed
from small import flags, make_rows, recipe, save_small_model

from moe_hf import MoEConfig, MoEForCausalLM

pytestmark = pytest.mark.gpu

# Those of recipes differ from these by sizes that one GPU cannot have, and some need several GPUs, or a folder.
SHIPPED = sorted(
    path.name
    for path in (ROOT / "ds_configs").glob("zero*.json")
    if not any(f'"{key}"' in path.read_text() for key in ("tensor_parallel", "pipeline", "nvme"))
)
SWITCHES = [
    "--fp8",
    "--torch_compile",
    "--tf32 true",
    "--optim paged_adamw_8bit",
    "--profile_steps 2:4",
    "--bf16 False --fp16 True",
]
ATTENTION = ["sdpa", *(["flash_attention_2"] if find_spec("flash_attn") else [])]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_json_trains_exports_and_generates(name, attention, tmp_path):
    save_small_model(tmp_path / "model", head_dim=32)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(24)))
    words = flags(
        recipe([]),
        ranks=1,
        model_name_or_path=tmp_path / "model",
        train_file=rows,
        output_dir=tmp_path / "out",
        deepspeed=ROOT / "ds_configs" / name,
        bf16=True,
        attn_implementation=attention,
    )
    text = (ROOT / "ds_configs" / name).read_text()
    if "autoep_size" in text:
        words += ["--expert_parallel_size", "1"]
    if '"Muon"' in text:
        words += ["--max_grad_norm", "0"]
    done = deepspeed(1, ROOT / "run_clm_moe.py", *words, on_cpu=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    losses = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in losses if "loss" in entry]
    assert len(losses) == 6 and all(torch.tensor(losses).isfinite())
    model, info = MoEForCausalLM.from_pretrained(
        tmp_path / "out" / "hf", output_loading_info=True, dtype=torch.bfloat16, attn_implementation=attention
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = model.cuda().generate(torch.tensor([[5, 6, 7]], device="cuda"), max_new_tokens=5, min_new_tokens=5)
    assert tokens.shape == (1, 8)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_trains(switch, tmp_path):
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
    )
    done = deepspeed(1, ROOT / "run_clm_moe.py", *words, *switch.split(), on_cpu=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    losses = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in losses if "loss" in entry]
    assert len(losses) == 6 and all(torch.tensor(losses).isfinite())


def test_cuda_gives_the_losses_of_the_cpu():
    torch.manual_seed(0)
    config = MoEConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_experts=4,
        initializer_range=0.1,
    )
    model = MoEForCausalLM(config)
    tokens = torch.randint(0, 128, (2, 16))
    on_cpu = model(tokens, labels=tokens)
    on_cpu.loss.backward()
    router_gradient = model.model.layers[0].mlp.gate.weight.grad.clone()
    model.zero_grad()
    on_cuda = model.cuda()(tokens.cuda(), labels=tokens.cuda())
    on_cuda.loss.backward()
    for name in ("loss", "ce_loss", "aux_loss", "z_loss"):
        torch.testing.assert_close(on_cuda[name].cpu(), on_cpu[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.model.layers[0].mlp.gate.weight.grad.cpu(), router_gradient, rtol=1e-3, atol=1e-5)
