"""The run scaled down for the self-test: a small model of the same structure, its first weights, and rows."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..checkpoint.architectures.function import make_config
from ..configuration_moe import MoEConfig
from ..modeling_moe import MoEForCausalLM
from ..presets.scaling import scaled_down

_MOST_LAYERS = 6
_SHORTEST_ROW, _LONGEST_ROW = 6, 20
# Large initial weights keep what the experts add visible beside the residual stream.
_INITIALIZER_RANGE = 0.05
# How far a token's embedding points to the first and to the last of its experts; every second token visits this one.
_STRENGTHS = (6.0, 5.0)
_FAVOURITE = 0
# Larger than other weights: so that the loss and the gradient's norm show what happens to experts.
_EXPERTS_SCALE = 3.0
# Chance would be another on every layout.
_WITHOUT_CHANCE = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "router_jitter_noise": 0.0}
# Ways to say which layers are sparse, of which `mlp_layer_types` alone is kept.
_SHORTHANDS = ("moe_layer_indices", "decoder_sparse_step", "first_k_dense_replace")


def twin_of(config: MoEConfig, least_layers: int = 1) -> MoEConfig:
    """Return the configuration of the small model.

    As `presets.scaling.scaled_down` makes it: layer pattern, query heads per key-value head, experts, k and routing are
    those of the run. Besides, long models become shorter, and nothing is left to chance: no dropout, no jitter.

    Args:
        config: of the run.
        least_layers: such as the number of pipeline stages.
    """
    values = {name: getattr(config, name) for name in MoEConfig.__annotations__ if name not in _SHORTHANDS}
    kinds = shortened(config.mlp_layer_types, max(_MOST_LAYERS, least_layers))
    values |= {
        "mlp_layer_types": kinds,
        "num_hidden_layers": len(kinds),
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    values |= _WITHOUT_CHANCE | {"initializer_range": _INITIALIZER_RANGE}
    small = scaled_down(values)
    # Wide enough for as many directions as there are experts.
    small["hidden_size"] = max(small["hidden_size"], -(-config.num_experts // 8) * 8)
    return make_config(small)


def shortened(kinds: Sequence[str], most: int) -> list[str]:
    """Return the first `most` of the layers' kinds, and among them each kind that there is in all of them."""
    kept = list(kinds[:most])
    for kind in dict.fromkeys(kinds[most:]):
        if kind not in kept:
            kept[-1] = kind
    return kept


def write_twin(config: MoEConfig, folder: Path) -> None:
    """Write first weights, and a tokenizer for the trainer to export.

    Every token points clearly to k experts, others for each token and some experts more often than others: the loads
    are unequal, and rounding does not tip tokens from one expert to another, where the loss is not continuous.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = MoEForCausalLM(config)
        if config.num_sparse_layers:
            _point_tokens_to_experts(model)
    model.save_pretrained(folder)
    _save_tokenizer(config.vocab_size, folder)


def _point_tokens_to_experts(model: MoEForCausalLM) -> None:
    config = model.config
    directions = torch.linalg.qr(torch.randn(config.hidden_size, config.num_experts)).Q.T
    strengths = torch.linspace(*_STRENGTHS, config.num_experts_per_tok)
    draw = random.Random(7)
    for token, embedding in enumerate(model.model.embed_tokens.weight.data):
        experts = draw.sample(range(config.num_experts), config.num_experts_per_tok)
        if token % 2 == 0 and _FAVOURITE not in experts:
            experts[0] = _FAVOURITE
        embedding += (strengths[:, None] * directions[experts]).sum(dim=0)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.weight.data = 0.2 * layer.mlp.gate.weight.data + directions
            for weight in layer.mlp.experts.parameters():
                weight.data *= _EXPERTS_SCALE


def _save_tokenizer(vocab_size: int, folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", unk_token="w2")
    fast.save_pretrained(folder)


def make_rows(count: int, vocab_size: int, multiple_of: int = 1) -> list[dict[str, list[int]]]:
    """Return rows of unequal length with some labels masked, so that ranks see unequal numbers of tokens and labels.

    Args:
        count: number of rows.
        vocab_size: of the model.
        multiple_of: what every row's length has to be divided by, as sequence parallelism wants it.
    """
    draw = random.Random(5)
    rows = []
    for _ in range(count):
        length = draw.randint(_SHORTEST_ROW, _LONGEST_ROW)
        length = _LONGEST_ROW - _LONGEST_ROW % multiple_of if multiple_of > 1 else length
        ids = [draw.randint(3, vocab_size - 1) for _ in range(length)]
        masked = draw.randint(0, length // 2)
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [-100] * masked + ids[masked:]})
    return rows


def write_rows(rows: list[dict], path: Path) -> None:
    """Write rows as a file for `--train_file`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
