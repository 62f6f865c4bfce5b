"""Biases move by the load of a whole step, once, on all ranks alike, against the rule written out."""

import pytest
import torch
from helpers_model import random_ids, tiny_model
from oracle import choose_for_all, move_bias

from moe_hf import MoEForCausalLM
from moe_hf.training.bias_update import RouterBiasUpdater

LAYERS = (1, 2)
SPEED = 0.05


def make_model(**changes) -> MoEForCausalLM:
    values = {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "scoring_func": "sigmoid",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "router_balancing": "loss_free",
        "router_bias_update_speed": SPEED,
    }
    return tiny_model(**(values | changes)).train()


def make_batch(seed: int, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    input_ids = random_ids(len(lengths), max(lengths), seed)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def biases(model: MoEForCausalLM) -> list[torch.Tensor]:
    return [model.model.layers[i].mlp.gate.e_score_correction_bias for i in LAYERS]


def copies(model: MoEForCausalLM) -> list[torch.Tensor]:
    return [bias.clone() for bias in biases(model)]


def assignments(model: MoEForCausalLM, batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    """Return for each layer the expert of every assignment of an unmasked token."""
    result = [[] for _ in LAYERS]
    for batch in batches:
        keep = batch["attention_mask"].flatten().bool()
        with torch.no_grad():
            logits = model(**batch, output_router_logits=True).router_logits
        for layer, (of_layer, bias) in enumerate(zip(logits, biases(model), strict=True)):
            chosen = choose_for_all(of_layer[keep], bias, model.config)
            result[layer] += [expert for experts in chosen for expert in experts]
    return result


def test_biases_follow_the_rule_over_micro_batches_and_steps():
    model = make_model()
    updater = RouterBiasUpdater(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    expected = copies(model)
    for step in range(5):
        batches = [make_batch(10 * step, (9, 5)), make_batch(10 * step + 1, (3, 7, 1))]
        chosen = assignments(model, batches)
        assert model.assignment_counts is None, "a pass without gradients is no training"
        for batch in batches:
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        for bias in biases(model):
            assert not torch.equal(bias, torch.zeros(8)) or step == 0
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
        for bias, of_layer, actual in zip(expected, chosen, biases(model), strict=True):
            move_bias(bias, of_layer, SPEED)
            torch.testing.assert_close(actual, bias, rtol=0.0, atol=1e-6)
    assert all(bias.abs().max() > SPEED for bias in biases(model))
    assert not torch.equal(*biases(model)), "layers are balanced each by itself"


def test_sign_and_size_of_a_move():
    model = make_model()
    updater = RouterBiasUpdater(model)
    # Means of 3 and of 2.125: an expert with exactly the mean stays.
    model.assignment_counts = torch.tensor([[3, 0, 6, 3, 3, 2, 4, 3], [17, 0, 0, 0, 0, 0, 0, 0]])
    updater.step()
    signs = [[0, 1, -1, 0, 0, 1, -1, 0], [-1, 1, 1, 1, 1, 1, 1, 1]]
    for bias, expected in zip(biases(model), signs, strict=True):
        torch.testing.assert_close(bias, SPEED * torch.tensor(expected).float(), rtol=0.0, atol=0.0)


def test_the_mean_is_exact_for_large_counts():
    """One assignment more or less in 2**40 still decides; in float32 it would be lost."""
    model = make_model()
    updater = RouterBiasUpdater(model)
    counts = torch.full((2, 8), 2**40)
    counts[:, 0] += 1
    counts[:, 1] -= 1
    model.assignment_counts = counts
    updater.step()
    for bias in biases(model):
        assert torch.sign(bias).tolist() == [-1, 1, 0, 0, 0, 0, 0, 0]


def test_ranks_move_as_one_process_with_all_their_tokens():
    shares = [make_batch(1, (9, 5)), make_batch(2, (2, 4))]
    ranks, alone = [make_model() for _ in shares], make_model()
    updaters = [RouterBiasUpdater(model) for model in (*ranks, alone)]
    for model, share in zip(ranks, shares, strict=True):
        model(**share)
        alone(**share)
    total, calls = sum(model.assignment_counts for model in ranks), []

    def reduce(counts: torch.Tensor) -> torch.Tensor:
        assert not counts.is_floating_point()
        calls.append(counts)
        return total.clone()

    local = copies(make_model())
    for layer, counts in enumerate(ranks[0].assignment_counts.tolist()):
        move_bias(local[layer], [e for e, count in enumerate(counts) for _ in range(count)], SPEED)
    for model in ranks:
        model.reduce_router_statistics = reduce
    for updater in updaters:
        updater.step()
    assert len(calls) == 2, "one collective for all layers together"
    for first, second, whole in zip(*(biases(model) for model in (*ranks, alone)), strict=True):
        assert torch.equal(first, second) and torch.equal(first, whole)
    assert any(not torch.equal(a, b) for a, b in zip(local, biases(alone), strict=True)), "the case tells nothing"


def test_a_skipped_step_moves_nothing_and_is_forgotten():
    model, calls = make_model(), []
    updater = RouterBiasUpdater(model)
    model.reduce_router_statistics = lambda counts: calls.append(counts) or counts
    model(**make_batch(1, (9, 5)))
    updater.step(skipped=True)
    assert not any(bias.any() for bias in biases(model)) and model.assignment_counts is None and not calls
    later = make_batch(2, (4, 4))
    chosen = assignments(model, [later])
    model(**later)
    updater.step(skipped=False)
    for actual, of_layer in zip(biases(model), chosen, strict=True):
        expected = torch.zeros(8)
        move_bias(expected, of_layer, SPEED)
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-6)


def test_counts_begin_anew_after_each_step():
    model = make_model()
    updater = RouterBiasUpdater(model)
    model(**make_batch(1, (9, 5)))
    updater.step()
    assert model.assignment_counts is None
    before = copies(model)
    updater.step()
    assert all(torch.equal(a, b) for a, b in zip(biases(model), before, strict=True))


def test_what_an_interrupted_step_has_counted_is_forgotten():
    model = make_model()
    model(**make_batch(1, (9, 5)))
    RouterBiasUpdater(model).step()
    assert not any(bias.any() for bias in biases(model))


def test_a_speed_of_zero_freezes_the_biases_without_a_collective():
    model = make_model(router_bias_update_speed=0.0)
    model.reduce_router_statistics = lambda counts: pytest.fail("nothing is to be summed")
    updater = RouterBiasUpdater(model)
    model(**make_batch(1, (9, 5)))
    updater.step()
    assert not any(bias.any() for bias in biases(model)) and model.assignment_counts is None


@pytest.mark.parametrize("changes", [{"router_balancing": "aux_loss"}, {"router_balancing": "none"}])
def test_other_ways_of_balancing_have_nothing_to_move(changes):
    model = make_model(**changes)
    model.reduce_router_statistics = lambda counts: pytest.fail("nothing is to be summed")
    updater = RouterBiasUpdater(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model(**make_batch(1, (9, 5)))
    updater.step()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_biases_of_a_cast_model_make_steps_too_small_for_16_bits():
    model = make_model(router_bias_update_speed=1e-4).bfloat16()
    updater = RouterBiasUpdater(model)
    for bias in biases(model):
        bias.fill_(1.0)
    for _ in range(10):
        model.assignment_counts = torch.tensor([[16, 0, 0, 0, 0, 0, 0, 0]] * 2)
        updater.step()
    for bias in biases(model):
        torch.testing.assert_close(bias, torch.tensor([0.999] + 7 * [1.001]), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_the_load_becomes_even(scoring_func):
    changes = {"scoring_func": scoring_func, "n_group": 1, "topk_group": 1, "router_bias_update_speed": 0.01}
    model, batch = make_model(**changes), make_batch(3, (40, 40, 40, 40))
    updater = RouterBiasUpdater(model)
    for bias in biases(model):
        bias[:3] = torch.tensor([0.5, 0.4, -0.5])
    largest = []
    for _ in range(150):
        model(**batch)
        counts = model.assignment_counts.float()
        largest.append((counts.max(dim=1).values / counts.mean(dim=1)).max().item())
        updater.step()
    assert largest[0] > 2.0
    assert max(largest[-10:]) < 1.3
