"""Sums between log entries: of made-up outputs, and of the model's, counted token by token from its router logits."""

import math

import pytest
import torch
from small import make_rows, small_config

from moe_hf import MoEForCausalLM
from moe_hf.data.collator import CausalLMCollator
from moe_hf.modeling_outputs import MoECausalLMOutput
from moe_hf.parameter_families import FAMILIES
from moe_hf.training.telemetry import statistics as statistics_module
from moe_hf.training.telemetry.loads import LatestLoads
from moe_hf.training.telemetry.statistics import TrainingStatistics, router_bias_ranges

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


def statistics_of(config=None, loads: LatestLoads | None = None, **changes) -> TrainingStatistics:
    values = {"shares_are_sums": True, "dead_expert_steps": 100} | changes
    return TrainingStatistics(config or small_config(), loads or LatestLoads(), **values)


def micro_batch(ce: float, aux=(0.0, 0.0), z=(0.0, 0.0), **others) -> MoECausalLMOutput:
    """What the small model, whose layers 1 and 3 are sparse, returns."""
    losses = {"layer_aux_losses": torch.tensor(aux), "layer_z_losses": torch.tensor(z)}
    return MoECausalLMOutput(ce_loss=torch.tensor(ce, requires_grad=True), **losses, **others)


def counted(*layers: list[int]) -> dict[str, torch.Tensor]:
    """Assignments `(L, 1, E)` of one sequence."""
    return {"tokens_per_expert": torch.tensor(layers).unsqueeze(1)}


EVEN = counted([1, 1, 1, 1], [1, 1, 1, 1])
ONE = torch.tensor(1)


# --------------------------------------------------------------------------------------------------------------------
# Losses


def test_z_loss_of_the_predictions_is_told_where_there_is_one():
    statistics = statistics_of()
    for share in (1.0, 2.0):
        statistics.add_micro_batch(micro_batch(0.0, output_z_loss=torch.tensor(share), **EVEN), ONE)
    statistics.add_step(torch.tensor(1))
    assert statistics.pop(0.0)["output_z_loss"] == 3.0


def test_shares_of_micro_batches_add_up_and_steps_are_averaged():
    statistics = statistics_of()
    for step in range(2):
        for share in (0.5, 1.5):
            outputs = micro_batch(share + step, (share, 2 * share), (3 * share, 4 * share), **EVEN)
            statistics.add_micro_batch(outputs, ONE)
        statistics.add_step(torch.tensor(30))
    logs = statistics.pop(2.5)
    # Per step: 0.5 + 1.5 and 1.5 + 2.5 of cross-entropy; the router's parts are the same in both.
    expected = {
        "num_tokens": 60,
        "ce_loss": 3.0,
        "aux_loss": 6.0,
        "z_loss": 14.0,
        "aux_loss/layer_1": 2.0,
        "aux_loss/layer_3": 4.0,
        "z_loss/layer_1": 6.0,
        "z_loss/layer_3": 8.0,
        "peak_memory_gib": 2.5,
    }
    assert {name: logs[name] for name in expected} == expected


def test_every_entry_begins_anew():
    statistics = statistics_of()
    for number, value in enumerate((1.0, 5.0), start=1):
        loads = counted([number, 1, 1, 1], [2, 2, 2, 2])
        outputs = micro_batch(value, (value, 0.0), (value, 0.0), dropped_assignments=torch.ones(2, 1), **loads)
        statistics.add_micro_batch(outputs, ONE)
        statistics.add_step(10)
        logs = statistics.pop(0.0)
        assert (logs["ce_loss"], logs["aux_loss"], logs["num_tokens"]) == (value, value, 10 * number)
        assert logs["max_vio/layer_1"] == pytest.approx(number / ((number + 3) / 4) - 1)
        assert logs["dropped_fraction/layer_3"] == 1 / 8
    assert statistics.pop(0.0) == {}


def test_micro_batches_without_a_step_are_not_reported():
    loads = LatestLoads(train={"layer_1": [1.0]})
    statistics = statistics_of(loads=loads)
    assert statistics.pop(0.0) == {} and loads.train is None
    statistics.add_micro_batch(micro_batch(1.0, **EVEN), ONE)
    assert statistics.pop(0.0) == {}
    statistics.add_step(4)
    logs = statistics.pop(0.0)
    assert (logs["ce_loss"], logs["num_tokens"]) == (1.0, 4)


def test_means_of_ranks_are_averaged_over_ranks(monkeypatch):
    """Where every rank's loss is a mean, the sum over ranks is divided by their number; here one speaks for four."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    for shares_are_sums, expected, num_tokens in ((True, 8.0, 3), (False, 2.0, 12)):
        statistics = statistics_of(shares_are_sums=shares_are_sums)
        statistics.add_micro_batch(micro_batch(8.0, (8.0, 0.0), (8.0, 0.0), **EVEN), ONE)
        statistics.add_step(12)
        logs = statistics.pop(0.0)
        assert logs["ce_loss"] == logs["aux_loss/layer_1"] == logs["z_loss"] == expected
        assert logs["num_tokens"] == num_tokens


def test_rounded_parts_are_summed_in_float32():
    statistics = statistics_of()
    for _ in range(300):  # bfloat16 cannot count beyond 256
        part = torch.ones(2, dtype=torch.bfloat16)
        outputs = MoECausalLMOutput(ce_loss=part[0], layer_aux_losses=part, layer_z_losses=part, **EVEN)
        statistics.add_micro_batch(outputs, ONE)
    statistics.add_step(1)
    logs = statistics.pop(0.0)
    assert logs["ce_loss"] == logs["aux_loss/layer_1"] == logs["z_loss/layer_3"] == 300.0


def test_a_dense_model_has_no_routers_to_speak_of():
    statistics = statistics_of(small_config(num_experts=0, shared_expert_intermediate_size=0, shared_expert_gate=False))
    statistics.add_micro_batch(MoECausalLMOutput(ce_loss=torch.tensor(1.5)), torch.tensor(7))
    statistics.add_step(7)
    assert statistics.pop(0.5) == {"num_tokens": 7, "ce_loss": 1.5, "peak_memory_gib": 0.5}


# --------------------------------------------------------------------------------------------------------------------
# Loads, entropies and logits: of the model, against its router logits token by token


def batches() -> list[dict]:
    """Micro-batches of rows of unequal length, so with padding."""
    rows, collate = make_rows(8), CausalLMCollator(pad_token_id=0)
    return [collate(rows[:3]), collate(rows[3:4]), collate(rows[4:])]


def logits_of_tokens(model: MoEForCausalLM, batch: dict) -> list[list[list[float]]]:
    """Return the router logits of every token that is not padding, for each sparse layer."""
    with torch.no_grad():
        outputs = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
    kept = batch["attention_mask"].flatten().tolist()
    return [[row for row, keep in zip(of.tolist(), kept, strict=True) if keep] for of in outputs.router_logits]


def described(tokens: list[list[float]], top_k: int) -> dict:
    """Return the description of one layer's tokens, each given by its logits."""
    num_experts = len(tokens[0])
    counts, entropy = [0] * num_experts, 0.0
    for logits in tokens:
        for expert in sorted(range(num_experts), key=lambda e: logits[e], reverse=True)[:top_k]:
            counts[expert] += 1
        total = sum(math.exp(x) for x in logits)
        entropy -= sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in logits)
    return {
        "load": [count / (top_k * len(tokens)) for count in counts],
        "max_vio": max(counts) * num_experts / sum(counts) - 1,
        "router_entropy": entropy / len(tokens) / math.log(num_experts),
        "router_logit_max": max(abs(x) for logits in tokens for x in logits),
    }


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_accumulated_micro_batches_are_counted_token_by_token(checkpointing):
    torch.manual_seed(3)
    model = MoEForCausalLM(small_config()).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loads = LatestLoads()
    statistics = statistics_of(model.config, loads)
    for batch in batches():
        outputs = model(**batch, output_router_statistics=True)
        outputs.loss.backward()
        statistics.add_micro_batch(outputs, batch["attention_mask"].sum())
    statistics.add_step(sum(batch["attention_mask"].sum() for batch in batches()))
    logs = statistics.pop(0.0)

    of_batches = [logits_of_tokens(model, batch) for batch in batches()]
    for number, name in enumerate(("layer_1", "layer_3")):
        tokens = [token for layers in of_batches for token in layers[number]]
        assert logs["num_tokens"] == len(tokens)
        expected = described(tokens, top_k=2)
        assert loads.train[name] == pytest.approx(expected.pop("load"), abs=0)
        for metric, value in expected.items():
            assert logs[f"{metric}/{name}"] == pytest.approx(value, rel=1e-5), metric
    assert logs["max_vio"] == pytest.approx((logs["max_vio/layer_1"] + logs["max_vio/layer_3"]) / 2)
    assert logs["load_entropy"] == pytest.approx((logs["load_entropy/layer_1"] + logs["load_entropy/layer_3"]) / 2)
    assert logs["max_vio/layer_1"] != pytest.approx(logs["max_vio/layer_3"], rel=0.01)


def test_steps_that_were_not_sampled_have_loads_only():
    model = MoEForCausalLM(small_config()).train()
    statistics = statistics_of(model.config)
    batch = batches()[0]
    statistics.add_micro_batch(model(**batch), batch["attention_mask"].sum())
    statistics.add_step(1)
    logs = statistics.pop(0.0)
    assert "load_entropy/layer_1" in logs
    assert not [name for name in logs if name.startswith(("router_", "grad_norm", "attention_sink", "dropped"))]


def test_dropped_assignments_are_a_share_of_all():
    statistics = statistics_of()
    for dropped in ([[1], [0]], [[2], [4]]):
        loads = counted([5, 1, 1, 1], [2, 2, 2, 2])
        statistics.add_micro_batch(micro_batch(1.0, dropped_assignments=torch.tensor(dropped), **loads), ONE)
    statistics.add_step(1)
    logs = statistics.pop(0.0)
    assert (logs["dropped_fraction/layer_1"], logs["dropped_fraction/layer_3"]) == (3 / 16, 4 / 16)
    assert logs["dropped_fraction"] == 7 / 32


def test_experts_die_after_the_steps_that_were_asked_for():
    statistics = statistics_of(dead_expert_steps=4)

    def entry(steps: int, first: list[int], second: list[int]) -> tuple[int, int, int]:
        for _ in range(steps):
            statistics.add_micro_batch(micro_batch(1.0, **counted(first, second)), ONE)
            statistics.add_step(1)
        logs = statistics.pop(0.0)
        return logs["dead_experts/layer_1"], logs["dead_experts/layer_3"], logs["dead_experts"]

    assert entry(3, [9, 0, 0, 1], [1, 1, 1, 1]) == (0, 0, 0)
    assert entry(1, [9, 0, 0, 1], [0, 1, 1, 1]) == (2, 0, 2)
    assert entry(2, [9, 0, 1, 1], [0, 1, 1, 1]) == (1, 0, 1)
    assert entry(1, [9, 0, 0, 1], [0, 1, 1, 1]) == (1, 1, 2)
    assert entry(1, [9, 1, 0, 1], [1, 1, 1, 1]) == (0, 0, 0)


# --------------------------------------------------------------------------------------------------------------------
# Gradients, attention, biases


def test_gradient_norms_are_roots_of_summed_squares():
    statistics = statistics_of()
    squares = torch.arange(len(FAMILIES), dtype=torch.float64).square() * 0.25
    statistics.add_gradients(squares)
    statistics.add_micro_batch(micro_batch(1.0, **EVEN), ONE)
    statistics.add_step(1)
    logs = statistics.pop(0.0)
    assert [logs[f"grad_norm/{family}"] for family in FAMILIES] == [0.5 * i for i in range(len(FAMILIES))]


def test_what_was_not_measured_is_not_reported():
    statistics = statistics_of()
    statistics.add_gradients(None)
    statistics.add_attention_sink(None)
    statistics.add_micro_batch(micro_batch(1.0, **EVEN), ONE)
    statistics.add_step(1)
    assert not [name for name in statistics.pop(0.0) if name.startswith(("grad_norm", "attention_sink"))]


def test_attention_is_a_mean_over_heads_and_queries():
    statistics = statistics_of()
    statistics.add_attention_sink((torch.tensor([1.0, 2.0, 3.0, 6.0]), 12))
    statistics.add_micro_batch(micro_batch(1.0, **EVEN), ONE)
    statistics.add_step(1)
    logs = statistics.pop(0.0)
    assert [logs[f"attention_sink/layer_{i}"] for i in range(4)] == pytest.approx([1 / 12, 1 / 6, 1 / 4, 1 / 2])
    assert logs["attention_sink"] == pytest.approx(1 / 4)


def test_biases_are_told_by_their_range():
    model = MoEForCausalLM(small_config(router_balancing="loss_free"))
    for layer, biases in ((1, [0.1, -0.3, 0.2, 0.0]), (3, [0.5, 0.6, 0.7, 0.8])):
        model.model.layers[layer].mlp.gate.e_score_correction_bias.copy_(torch.tensor(biases))
    assert router_bias_ranges(model) == pytest.approx(
        {
            "router_bias_min/layer_1": -0.3,
            "router_bias_max/layer_1": 0.2,
            "router_bias_min/layer_3": 0.5,
            "router_bias_max/layer_3": 0.8,
        }
    )
    assert router_bias_ranges(MoEForCausalLM(small_config())) == {}


# --------------------------------------------------------------------------------------------------------------------
# Resuming


def test_tokens_are_settled_between_entries_and_counted_once():
    statistics = statistics_of()
    for tokens in (5, 7):
        statistics.add_micro_batch(micro_batch(1.0, **EVEN), ONE)
        statistics.add_step(tokens)
        statistics.settle_tokens()
    assert statistics.num_tokens == 12
    statistics.settle_tokens()
    statistics.add_step(torch.tensor(3))
    assert statistics.pop(0.0)["num_tokens"] == statistics.num_tokens == 15


def test_a_resumed_run_goes_on_counting():
    config = small_config()
    before = statistics_of(config, dead_expert_steps=5)
    for _ in range(3):
        before.add_micro_batch(micro_batch(1.0, **counted([1, 0, 1, 1], [1, 1, 1, 1])), ONE)
        before.add_step(11)
    before.pop(0.0)
    resumed = statistics_of(config, dead_expert_steps=5)
    resumed.load_state_dict(before.state_dict())
    for _ in range(2):
        resumed.add_micro_batch(micro_batch(1.0, **counted([1, 0, 1, 0], [1, 1, 1, 1])), ONE)
        resumed.add_step(11)
    logs = resumed.pop(0.0)
    assert (logs["num_tokens"], logs["dead_experts/layer_1"], logs["dead_experts"]) == (55, 1, 1)


# --------------------------------------------------------------------------------------------------------------------
# Ranks that share matrices


@pytest.mark.parametrize("shares_are_sums", [True, False])
def test_what_every_rank_of_a_group_has_counts_once(shares_are_sums, monkeypatch):
    """Four ranks with the same sums, two of which share matrices: gradients and heads are parts, the rest copies."""
    monkeypatch.setattr(statistics_module, "world_size", lambda: 4)
    monkeypatch.setattr(
        statistics_module,
        "reduce_over_ranks",
        lambda sums, maxima: tuple(
            {name: factor * tensor.detach().double().numpy() for name, tensor in of.items()}
            for factor, of in ((4, sums), (1, maxima))
        ),
    )
    loads = LatestLoads()
    statistics = statistics_of(loads=loads, shares_are_sums=shares_are_sums, num_copies=2)
    statistics.add_micro_batch(micro_batch(3.0, (1.0, 1.0), **counted([3, 1, 0, 0], [1, 1, 1, 1])), ONE)
    statistics.add_step(torch.tensor(30))
    statistics.add_gradients(torch.full((len(FAMILIES),), 4.0, dtype=torch.float64))
    statistics.add_attention_sink((torch.ones(4), 2))
    logs = statistics.pop(0.0)
    assert logs["num_tokens"] == (30 if shares_are_sums else 60)
    assert logs["ce_loss"] == (6.0 if shares_are_sums else 3.0)
    assert logs["aux_loss"] == (4.0 if shares_are_sums else 2.0)
    assert loads.train["layer_1"] == [0.75, 0.25, 0.0, 0.0]
    assert logs[f"grad_norm/{FAMILIES[0]}"] == 4.0
    assert logs["attention_sink"] == 0.5
    statistics.add_step(torch.tensor(30))
    statistics.settle_tokens()
    assert statistics.num_tokens == 2 * logs["num_tokens"]
