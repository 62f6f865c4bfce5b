"""The small mixed model, its rows, and the matrix of runs that several tests look at from different sides."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_hf import MoEConfig, MoEForCausalLM

# 24 rows of every global step: the same whether 2 or 4 ranks share them.
NUM_STEPS = 6
GLOBAL_MICRO_BATCH = 4


@pytest.fixture(scope="session")
def small_config() -> MoEConfig:
    """Mixed dense and sparse layers; the large initial weights keep the experts' output visible beside the residual."""
    return MoEConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        decoder_sparse_step=2,
        num_experts=4,
        num_experts_per_tok=2,
        use_qk_norm=True,
        shared_expert_intermediate_size=16,
        shared_expert_gate=True,
        router_aux_loss_coef=0.05,
        router_z_loss_coef=0.02,
        initializer_range=0.15,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="session")
def small_model(small_config, tmp_path_factory):
    """Folder with the initial weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("small_model")
    torch.manual_seed(11)
    model = MoEForCausalLM(small_config)
    # Unbalanced on purpose: experts get very different numbers of tokens.
    for layer in model.model.layers[1::2]:
        layer.mlp.gate.weight.data[0] += 0.3
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder) -> None:
    """Save a tokenizer of 128 words `w0 … w127`, of which w0 pads and w1 ends a text."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", unk_token="w2").save_pretrained(
        folder
    )


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Rows of unequal length with some labels masked, so that ranks see unequal numbers of tokens and of labels."""
    draw = random.Random(5)
    made = []
    for _ in range(NUM_STEPS * 2 * GLOBAL_MICRO_BATCH):
        length = draw.randint(6, 20)
        ids = [draw.randint(3, 127) for _ in range(length)]
        masked = draw.randint(0, length // 2)
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [-100] * masked + ids[masked:]})
    return made


@pytest.fixture(scope="session")
def rows_file(rows, tmp_path_factory):
    """The rows as a file for --train_file."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
