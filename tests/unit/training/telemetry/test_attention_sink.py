"""The mass on the first token against the weights that eager attention returns, added up one by one."""

import pytest
import torch
from small import small_config

from moe_hf import MoEForCausalLM
from moe_hf.training.telemetry import attention_sink
from moe_hf.training.telemetry.attention_sink import AttentionSink


def model_of(implementation: str, **changes) -> MoEForCausalLM:
    """A model of four query heads on two key heads whose attention is far from uniform."""
    torch.manual_seed(7)
    # As in training: with a cache the model does not see documents.
    config = small_config(use_cache=False, **changes)
    model = MoEForCausalLM._from_config(config, attn_implementation=implementation)
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data.fill_(3.0)
    return model


def measured(model: MoEForCausalLM, batch: dict) -> tuple[torch.Tensor, int]:
    sink = AttentionSink(model)
    with sink.measure(batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")):
        model(**batch)
    return sink.pop()


def expected(model: MoEForCausalLM, batch: dict, firsts: dict[int, int]) -> list[float]:
    """Return for each layer the weights from each query of `firsts` to its first token, added over heads."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    return [
        sum(weights[0, head, query, first].item() for query, first in firsts.items() for head in range(4))
        for weights in attentions
    ]


def check(model: MoEForCausalLM, batch: dict, firsts: dict[int, int]) -> list[float]:
    masses, num_weights = measured(model, batch)
    assert num_weights == 4 * len(firsts)
    reference = expected(model, batch, firsts)
    assert masses.tolist() == pytest.approx(reference, rel=1e-4)
    return reference


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_query_after_the_first(implementation):
    batch = {"input_ids": torch.arange(3, 3 + 24).reshape(2, 12)}
    masses = check(model_of(implementation), batch, dict.fromkeys(range(1, 12), 0))
    uniform = sum(4 / (query + 1) for query in range(1, 12))
    assert max(abs(mass / uniform - 1) for mass in masses) > 0.05, "a uniform attention would pass too"
    assert len({round(mass, 3) for mass in masses}) == 4, "layers differ, so that an exchange would be seen"


def test_scaling_is_that_of_the_module():
    model = model_of("sdpa")
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.scaling *= 0.3 + number
    check(model, {"input_ids": torch.arange(20, 36).reshape(1, 16)}, dict.fromkeys(range(1, 16), 0))


@pytest.mark.parametrize("kept", [slice(0, 9), slice(4, 13)], ids=["right", "left"])
def test_padding_neither_asks_nor_answers(kept):
    mask = torch.zeros(2, 13, dtype=torch.long)
    mask[0, kept] = 1
    mask[1] = 1
    batch = {"input_ids": torch.arange(30, 56).reshape(2, 13), "attention_mask": mask}
    check(model_of("sdpa"), batch, dict.fromkeys(range(kept.start + 1, kept.stop), kept.start))


def test_packed_documents_have_first_tokens_of_their_own():
    """A document of a single token in between, and one that goes on where another has stopped counting."""
    places = [0, 1, 2, 3, 4, 0, 0, 1, 2, 3]
    batch = {"input_ids": torch.arange(40, 60).reshape(2, 10), "position_ids": torch.tensor([places, [*range(10)]])}
    check(model_of("sdpa"), batch, {1: 0, 2: 0, 3: 0, 4: 0, 7: 6, 8: 6, 9: 6})


def test_with_a_mask_the_model_does_not_see_documents():
    places = [0, 1, 2, 3, 0, 1, 2, 3]
    batch = {
        "input_ids": torch.arange(60, 68).reshape(1, 8),
        "position_ids": torch.tensor([places]),
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
    }
    check(model_of("eager"), batch, dict.fromkeys(range(1, 8), 0))


def test_long_sequences_are_sampled_evenly(monkeypatch):
    monkeypatch.setattr(attention_sink, "MAX_QUERIES", 5)
    check(model_of("sdpa"), {"input_ids": torch.arange(3, 15).reshape(1, 12)}, dict.fromkeys((1, 3, 5, 7, 9), 0))


def test_a_sequence_of_first_tokens_has_nothing_to_measure():
    masses, num_weights = measured(model_of("sdpa"), {"input_ids": torch.tensor([[5]])})
    assert (masses.tolist(), num_weights) == ([0.0] * 4, 0)


def test_recomputation_is_not_counted_and_no_hook_stays():
    model = model_of("sdpa").train()
    batch = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
    once, _ = measured(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    sink = AttentionSink(model)
    with sink.measure(batch["input_ids"], None, None):
        loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    masses, _ = sink.pop()
    assert torch.equal(masses, once)
    assert not any(layer.self_attn.tap._forward_hooks for layer in model.model.layers)
    assert sink.pop() is None


def test_hooks_are_removed_when_the_forward_pass_fails():
    model = model_of("sdpa")
    with pytest.raises(RuntimeError, match="out of memory"), AttentionSink(model).measure(torch.ones(1, 4), None, None):
        raise RuntimeError("out of memory")
    assert not any(layer.self_attn.tap._forward_hooks for layer in model.model.layers)


def test_measuring_does_not_change_the_loss_or_the_gradients():
    losses, gradients = [], []
    for measures in (False, True):
        model = model_of("sdpa").train()
        ids = torch.arange(3, 27).reshape(2, 12)
        sink = AttentionSink(model)
        if measures:
            with sink.measure(ids, None, None):
                loss = model(input_ids=ids, labels=ids).loss
        else:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert losses[0] == losses[1]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
