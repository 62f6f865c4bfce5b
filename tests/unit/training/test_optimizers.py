"""Optimizers of `--optim` and of the DeepSpeed JSON, in one process; `distributed/test_precision.py` shards them."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import ROOT
from safetensors.torch import load_file
from small import deepspeed_json, flags, make_rows, recipe, save_small_model, small_config

from moe_hf import MoEForCausalLM
from moe_hf.checkpoint.topology import Topology, what_must_stay
from moe_hf.errors import CheckpointError, ConfigError
from moe_hf.parallel.deepspeed_checks import check_deepspeed_config
from moe_hf.parallel.deepspeed_config import read_deepspeed_json
from moe_hf.parallel.failure import FailureRelay
from moe_hf.parallel.muon import check_muon, is_hidden_matrix, leave_others_to_adam, uses_muon
from moe_hf.training.optimizer_choice import optimizer_family
from moe_hf.training.run import build_trainer, execute

STEPS = 6
MUON = {"optimizer": {"type": "Muon", "params": {"lr": "auto"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder with a model whose larger matrices bitsandbytes keeps in 8 bits, and rows."""
    path = tmp_path_factory.mktemp("optimizers")
    save_small_model(path / "model", hidden_size=64, intermediate_size=96, vocab_size=128)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(4 * STEPS)))
    return path


def trainer_of(folder: Path, name: str, **changes):
    words = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "rows.jsonl",
        "cache_dir": folder / "cache",
        "output_dir": folder / name,
        "report_to": "none",
        "use_cpu": True,
        "max_steps": STEPS,
    } | changes
    return build_trainer(flags(recipe([]), 1, **words), FailureRelay())


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def bytes_per_parameter(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> float:
    """Return the size of the states of these parameters, in bytes for each element."""
    states = [value for param in params for value in optimizer.state[param].values() if torch.is_tensor(value)]
    return sum(state.nbytes for state in states if state.numel() > 1) / sum(param.numel() for param in params)


def test_8bit_adamw_learns_like_adamw_with_a_quarter_of_its_states(folder, no_state_of_earlier_runs):
    plain, small = trainer_of(folder, "adamw"), trainer_of(folder, "8bit", optim="adamw_bnb_8bit")
    execute(plain)
    execute(small)
    assert losses(small) == pytest.approx(losses(plain), rel=2e-3)
    assert losses(small) != losses(plain)
    experts = [
        [layer.mlp.experts.gate_up_proj for layer in trainer.model.model.layers[1::2]] for trainer in (plain, small)
    ]
    states = small.optimizer.state[experts[1][0]]
    assert states["state1"].dtype == states["state2"].dtype == torch.uint8
    assert bytes_per_parameter(plain.optimizer, experts[0]) == 8
    # Besides the two states a float32 scale for each block of 256, and a map of 256 values for each tensor.
    assert bytes_per_parameter(small.optimizer, experts[1]) < 2.4
    # Trainer keeps the states of embeddings in 32 bits, as bitsandbytes recommends.
    assert small.optimizer.state[small.model.model.embed_tokens.weight]["state1"].dtype == torch.float32


def test_8bit_adamw_resumes_exactly_and_as_nothing_else(folder, no_state_of_earlier_runs):
    saves = {"optim": "adamw_bnb_8bit", "save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(folder, "whole", **saves)
    execute(whole)
    shutil.copytree(folder / "whole" / "checkpoint-3", folder / "resumed" / "checkpoint-3")
    resumed = trainer_of(folder, "resumed", **saves, resume_from_checkpoint="true")
    execute(resumed)
    assert losses(resumed) == losses(whole)
    one, other = (load_file(folder / name / "hf" / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(CheckpointError, match="the optimizer must stay adamw_8bit"):
        trainer_of(folder, "resumed", resume_from_checkpoint="true", overwrite_output_dir=False)


def test_fused_adamw_is_the_default_and_the_same_as_the_plain_one(folder, no_state_of_earlier_runs):
    fused, plain = trainer_of(folder, "fused"), trainer_of(folder, "plain", optim="adamw_torch")
    assert fused.args.optim == "adamw_torch_fused"
    execute(fused)
    execute(plain)
    assert losses(fused) == pytest.approx(losses(plain), rel=1e-6)
    assert fused.optimizer.param_groups[0]["fused"] is True


@pytest.mark.parametrize(
    ("optim", "config", "family"),
    [
        ("adamw_torch", None, "adamw"),
        ("adamw_torch_fused", {}, "adamw"),
        ("adamw_torch_fused", {"optimizer": {"type": "AdamW"}}, "adamw"),
        ("adamw_8bit", None, "adamw_8bit"),
        ("adamw_bnb_8bit", {}, "adamw_8bit"),
        ("adamw_torch_8bit", None, "adamw_torch_8bit"),
        ("adamw_torch_fused", MUON, "muon"),
        ("lion_8bit", None, "lion_8bit"),
    ],
)
def test_checkpoints_know_whose_states_they_hold(optim, config, family):
    assert optimizer_family(argparse.Namespace(optim=optim), config) == family


def test_optimizers_that_cannot_run_are_refused():
    with pytest.raises(ConfigError, match="without a GPU use adamw_bnb_8bit"):
        optimizer_family(argparse.Namespace(optim="paged_adamw_8bit"))
    with pytest.raises(ConfigError, match="DeepSpeed cannot shard"):
        optimizer_family(argparse.Namespace(optim="adamw_torch_8bit"), {})
    with pytest.raises(ConfigError, match=r"--optim lion_8bit has no effect beside optimizer\.type=AdamW"):
        optimizer_family(argparse.Namespace(optim="lion_8bit"), {"optimizer": {"type": "AdamW"}})


def test_states_of_another_optimizer_or_layout_are_refused():
    saved = Topology(2, 2, 2, "bfloat16", optimizer="muon")
    assert saved.describe().endswith(", muon")
    assert what_must_stay(saved, saved) is None
    assert what_must_stay(saved, Topology(2, 2, 2, "bfloat16")) == "the optimizer must stay muon"
    assert what_must_stay(Topology(2, 2, 2, "bfloat16"), saved) == "the optimizer must stay adamw"
    assert "layout must stay" in what_must_stay(saved, Topology(4, 2, 2, "bfloat16", optimizer="muon"))
    assert what_must_stay(Topology(2, 2, 2, "bfloat16"), Topology(4, 2, 2, "bfloat16")) is None
    without = Topology(1, 0, -1, "bfloat16", optimizer="adamw_8bit")
    assert what_must_stay(without, Topology(2, 0, -1, "bfloat16", optimizer="adamw_8bit")) is None


def test_muon_gets_matrices_between_embeddings_and_head_but_no_router():
    leave_others_to_adam()
    leave_others_to_adam()
    import deepspeed

    model = MoEForCausalLM(small_config(use_qk_norm=True, attention_gate="elementwise"))
    engine_config = argparse.Namespace(optimizer_name="muon", optimizer_params={})
    deepspeed.set_optimizer_flags(engine_config, model)
    marked = [name for name, param in model.named_parameters() if param.use_muon]
    attention = [f"{n}.self_attn.{part}_proj.weight" for n in range(4) for part in ("q", "k", "v", "o", "gate")]
    dense = [f"{n}.mlp.{part}_proj.weight" for n in (0, 2) for part in ("gate", "up", "down")]
    shared = [f"{n}.mlp.shared_experts.{part}_proj.weight" for n in (1, 3) for part in ("gate", "up", "down")]
    experts = [f"{n}.mlp.experts.{part}_proj" for n in (1, 3) for part in ("gate_up", "down")]
    assert sorted(marked) == sorted(f"model.layers.{name}" for name in attention + dense + shared + experts)
    # Names and shapes in an engine with AutoEP.
    assert is_hidden_matrix("model.layers.1.mlp.experts.w1", (2, 24, 32))
    assert not is_hidden_matrix("model.layers.1.mlp.router.weight", (4, 32))


def muon_json(stage: int = 2, **zero) -> dict:
    config = deepspeed_json(stage, 2, **MUON)
    config["zero_optimization"] |= zero
    return config


@pytest.mark.parametrize(
    ("config", "max_grad_norm", "fp16", "sentence"),
    [
        (muon_json(0), 0.0, False, "stage 1, 2 or 3"),
        (muon_json(), 1.0, False, "--max_grad_norm 0"),
        (muon_json(), 0.0, True, "--bf16 instead"),
        (muon_json(3), 0.0, False, '"reduce_scatter": false'),
        (muon_json(offload_optimizer={"device": "cpu"}), 0.0, False, "delete zero_optimization.offload_optimizer"),
    ],
)
def test_combinations_with_muon_are_refused_by_name(config, max_grad_norm, fp16, sentence):
    assert uses_muon(config)
    with pytest.raises(ConfigError, match=sentence):
        check_muon(config, max_grad_norm=max_grad_norm, fp16=fp16)


def test_muon_is_known_by_any_spelling():
    assert not uses_muon(None) and not uses_muon(deepspeed_json(2, 2))
    assert uses_muon({"optimizer": {"type": "muon"}})
    check_muon(muon_json(3, reduce_scatter=False), max_grad_norm=0.0, fp16=False)


def test_the_shipped_configuration_of_muon_fits_a_run_without_clipping():
    config = read_deepspeed_json(ROOT / "ds_configs" / "zero2_muon.json")
    run = {
        "world_size": 4,
        "num_experts": 8,
        "num_moe_layers": 3,
        "router_balancing": "aux_loss",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "bf16": True,
        "fp16": False,
        "learning_rate": 0.02,
    }
    assert uses_muon(config)
    check_deepspeed_config(config, max_grad_norm=0.0, **run)
    with pytest.raises(ConfigError, match="--max_grad_norm 0"):
        check_deepspeed_config(config, max_grad_norm=1.0, **run)
