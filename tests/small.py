"""The small mixed model and its rows, with which the distributed tests train."""

import random
from pathlib import Path

import oracle
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_hf import MoEConfig, MoEForCausalLM

# Rows of one global micro-batch: the same four whether 2 or 4 ranks share them.
GLOBAL_MICRO_BATCH = 4
NUM_STEPS = 6


def small_config(**changes) -> MoEConfig:
    """Mixed dense and sparse layers; the large initial weights keep the experts' output visible beside the residual."""
    values = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "decoder_sparse_step": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "use_qk_norm": True,
        "shared_expert_intermediate_size": 16,
        "shared_expert_gate": True,
        "router_aux_loss_coef": 0.05,
        "router_z_loss_coef": 0.02,
        "initializer_range": 0.15,
        "max_position_embeddings": 64,
    }
    return MoEConfig(**(values | changes))


def save_small_model(folder: Path, **changes) -> None:
    """Save initial weights and a tokenizer.

    Each token points clearly to two experts, the first of them for every second token: the loads are unequal, and
    rounding to 16 bits does not tip tokens from one expert to another, where the loss is not continuous.
    """
    torch.manual_seed(11)
    model = MoEForCausalLM(small_config(**changes))
    directions = torch.linalg.qr(torch.randn(model.config.hidden_size, model.config.hidden_size)).Q
    num_experts = model.config.num_experts
    for token, embedding in enumerate(model.model.embed_tokens.weight.data):
        first = 0 if token % 2 == 0 else 1 + token // 2 % (num_experts - 1)
        second = (first + 1 + token // 6 % (num_experts - 1)) % num_experts
        embedding += 2.0 * directions[first] + 1.4 * directions[second]
    for layer in model.model.layers[1::2]:
        layer.mlp.gate.weight.data = 0.2 * layer.mlp.gate.weight.data + directions[:num_experts]
    model.save_pretrained(folder)
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of 128 words `w0 … w127`, of which w0 pads and w1 ends a text."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", unk_token="w2").save_pretrained(
        folder
    )


def deepspeed_json(zero: int, ep: int | None, **sections) -> dict:
    """Return a DeepSpeed configuration; `ep` `None` leaves AutoEP out."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "initial_scale_power": 8},
        "zero_optimization": {"stage": zero},
    }
    if ep is not None:
        config["expert_parallel"] = {"enabled": True, "autoep_size": ep}
        if zero in (1, 2):  # as in ds_configs; without expert parallelism as DeepSpeed does if nothing is said
            config["zero_optimization"]["use_multi_rank_bucket_allreduce"] = False
    return config | sections


def recipe(rows: list[dict], accumulation: int = 1, learning_rate: float = 1e-3) -> oracle.Recipe:
    """Return what the oracle is to do; `flags` says the same on a command line."""
    config = small_config()
    return oracle.Recipe(
        rows=rows,
        num_steps=NUM_STEPS,
        micro_batches_per_step=accumulation,
        rows_per_micro_batch=GLOBAL_MICRO_BATCH,
        learning_rate=learning_rate,
        weight_decay=0.1,
        # Adam divides a gradient by its own size: at the usual 1e-8 an element whose gradient is rounding noise moves
        # by a full step in either direction, and a comparison would be of noise.
        adam_epsilon=1e-5,
        max_grad_norm=1.0,
        aux_coef=config.router_aux_loss_coef,
        z_coef=config.router_z_loss_coef,
    )


def flags(recipe: oracle.Recipe, ranks: int, **others) -> list[str]:
    """Return the words after `run_clm_moe.py` that make `ranks` processes do what `recipe` says."""
    words = {
        "validation_split_percentage": 0,
        "block_size": 32,
        "max_steps": recipe.num_steps,
        "per_device_train_batch_size": recipe.rows_per_micro_batch // ranks,
        "gradient_accumulation_steps": recipe.micro_batches_per_step,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "adam_epsilon": recipe.adam_epsilon,
        "max_grad_norm": recipe.max_grad_norm,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "do_train": True,
    } | others
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


def make_rows(count: int) -> list[dict]:
    """Make rows of unequal length with some labels masked, so that ranks see unequal numbers of tokens and labels."""
    draw = random.Random(5)
    rows = []
    for _ in range(count):
        length = draw.randint(6, 20)
        ids = [draw.randint(3, 127) for _ in range(length)]
        masked = draw.randint(0, length // 2)
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [-100] * masked + ids[masked:]})
    return rows
