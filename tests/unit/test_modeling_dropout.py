"""Dropout on the residual stream: where it acts, how often, and when not at all."""

import pytest
import torch
from helpers_model import random_ids, tiny_model

PROBABILITY = 0.25


def dropped_share(kept: torch.Tensor, whole: torch.Tensor) -> float:
    """Return the share of elements that are 0, after seeing that all others are scaled up to keep the mean."""
    assert torch.allclose(kept, torch.where(kept == 0, 0.0, whole / (1 - PROBABILITY)), atol=1e-6)
    return (kept == 0).float().mean().item()


def test_embeddings_attention_and_mlp_are_dropped_with_the_configured_probability():
    model = tiny_model(num_hidden_layers=2, first_k_dense_replace=1, hidden_dropout=PROBABILITY).train()
    seen = {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, args, n=number: seen.update({f"input_{n}": args[0]}))
        layer.register_forward_hook(lambda _, args, out, n=number: seen.update({f"output_{n}": out}))
        layer.self_attn.register_forward_hook(lambda _, args, out, n=number: seen.update({f"attention_{n}": out[0]}))
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, n=number: seen.update({f"middle_{n}": args[0]})
        )
        layer.mlp.register_forward_hook(lambda _, args, out, n=number: seen.update({f"mlp_{n}": out}))
    ids = random_ids(8, 32)
    model(ids)
    shares = [dropped_share(seen["input_0"], model.model.embed_tokens(ids))]
    for n in range(2):
        shares.append(dropped_share(seen[f"middle_{n}"] - seen[f"input_{n}"], seen[f"attention_{n}"]))
        shares.append(dropped_share(seen[f"output_{n}"] - seen[f"middle_{n}"], seen[f"mlp_{n}"]))
    assert shares == pytest.approx([PROBABILITY] * 5, abs=0.03)


def test_without_training_nothing_is_dropped():
    plain, dropping = tiny_model(), tiny_model(hidden_dropout=0.9)
    assert torch.equal(plain(random_ids(2, 9)).logits, dropping(random_ids(2, 9)).logits)


def test_recomputation_drops_the_same():
    results = []
    for checkpoints in (False, True):
        model = tiny_model(hidden_dropout=PROBABILITY).train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        ids = random_ids(2, 16)
        model(ids, labels=ids).loss.backward()
        results.append([param.grad for param in model.parameters()])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-7)
