"""The numbers on a model card, counted by hand."""

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import TrainingArguments

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.checkpoint.model_card import TrainingData, active_parameters, card_for_repository, render_model_card
from moe_hf.checkpoint.topology import Topology

# Two heads of 8 over one key-value head; layer 0 dense, layers 1 and 2 sparse with 5 experts of which a token sees 2.
SIZES = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "first_k_dense_replace": 1,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "use_qk_norm": True,
    "shared_expert_intermediate_size": 6,
    "shared_expert_gate": True,
    "max_position_embeddings": 64,
}
EMBEDDING = 100 * 16
ATTENTION = 16 * 16 + 2 * (8 * 16) + 16 * 16  # q, k and v, o
NORMS = 3 * (2 * 16 + 2 * 8) + 16  # of each layer two on the stream and two on heads, and the last
DENSE = 3 * 16 * 40
EXPERT = 3 * 16 * 12
ROUTER = 5 * 16
SHARED = 3 * 16 * 6 + 16


def test_parameters_are_those_counted_by_hand():
    count = active_parameters(MoEConfig(**SIZES))
    outside = 2 * EMBEDDING + 3 * ATTENTION + NORMS + DENSE + 2 * (ROUTER + SHARED)
    assert count.total == outside + 2 * 5 * EXPERT == 14_112
    assert count.active == outside + 2 * 2 * EXPERT == 10_656
    # Looking a token up costs no multiplication; neither do norms, here.
    assert count.in_matrices == count.active - EMBEDDING - NORMS


def test_tied_embeddings_are_counted_once_and_multiplied_once():
    untied, tied = (active_parameters(MoEConfig(**SIZES, tie_word_embeddings=tie)) for tie in (False, True))
    assert (tied.total, tied.active) == (untied.total - EMBEDDING, untied.active - EMBEDDING)
    assert tied.in_matrices == untied.in_matrices


def test_every_parameter_of_a_dense_model_is_active():
    sizes = SIZES | {"num_experts": 0, "first_k_dense_replace": 0}
    count = active_parameters(MoEConfig(**sizes | {"shared_expert_gate": False, "shared_expert_intermediate_size": 0}))
    assert count.total == count.active == 2 * EMBEDDING + 3 * (ATTENTION + DENSE) + NORMS


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"router_balancing": "loss_free"}]
)
def test_total_is_that_of_the_model(changes):
    config = MoEConfig(**SIZES | changes)
    assert active_parameters(config).total == sum(p.numel() for p in MoEForCausalLM(config).parameters())


# --------------------------------------------------------------------------------------------------------------------
# The card

HISTORY = [
    {"loss": 5.21182, "ce_loss": 5.1, "aux_loss": 2.0, "z_loss": 9.0, "step": 10},
    {"eval_loss": 4.9, "eval_perplexity": 134.2, "step": 15},
    {"loss": 4.50417, "ce_loss": 4.42011, "aux_loss": 2.04304, "z_loss": 7.50508, "step": 2000},
    {"eval_loss": 4.84609, "eval_perplexity": 127.24268, "step": 2000},
    {"train_runtime": 3.0, "train_loss": 4.8, "step": 2000},
]


def rows_of(card: str) -> dict[str, str]:
    cells = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {cell[0]: cell[1] for cell in cells if len(cell) == 2}


def test_measured_losses_appear():
    rows = rows_of(render_model_card(MoEConfig(**SIZES), HISTORY))
    assert rows["steps"] == "2,000"
    assert rows["training loss"] == "5.2118 at step 10, 4.5042 at the end"
    assert rows["training cross-entropy"] == "4.4201"
    assert (rows["load-balancing loss"], rows["z-loss"]) == ("2.0430", "7.5051")
    assert (rows["evaluation loss"], rows["evaluation perplexity"]) == ("4.8461", "127.243")


def test_nothing_is_said_to_be_measured_that_was_not():
    card = render_model_card(MoEConfig(**SIZES), [])
    assert "Measured" not in card and "loss" not in rows_of(card)
    rows = rows_of(render_model_card(MoEConfig(**SIZES), HISTORY[:1]))
    assert "evaluation loss" not in rows and rows["training loss"] == "5.2118 at step 10, 5.2118 at the end"
    assert "z-loss" not in rows_of(render_model_card(MoEConfig(**SIZES), [{"loss": 1.0, "ce_loss": 1.0, "step": 1}]))


def test_architecture_appears():
    rows = rows_of(render_model_card(MoEConfig(**SIZES), []))
    assert rows["parameters"] == "14,112 in all, 10,656 active for one token"
    assert rows["layers"] == "3, of which 2 are mixtures of experts"
    assert rows["experts"] == "5 of width 12, 2 per token"
    assert rows["attention"] == "2 heads, 1 key-value heads, head size 8"
    assert rows["shared expert"] == "width 6, weighed by a sigmoid gate"
    assert rows["router"] == "softmax scores, weights of a token sum to 1"
    assert rows["load balancing"] == "loss with weight 0.01 (global)"
    assert rows["router z-loss"] == "weight 0.001"
    dense = rows_of(render_model_card(MoEConfig(vocab_size=100, num_experts=0), []))
    assert not dense.keys() & {"experts", "shared expert", "router", "load balancing", "router z-loss"}


def test_router_appears_as_it_is_configured():
    changes = {
        "num_experts": 8,
        "scoring_func": "sigmoid",
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.5,
        "router_balancing": "loss_free",
        "router_bias_update_speed": 0.002,
        "router_z_loss_coef": 0.0,
        "shared_expert_intermediate_size": 0,
        "shared_expert_gate": False,
    }
    rows = rows_of(render_model_card(MoEConfig(**SIZES | changes), []))
    assert rows["router"] == (
        "sigmoid scores, the best 2 of 4 groups by the sum of their two best scores, weights are the scores, times 2.5"
    )
    assert rows["load balancing"] == "without a loss: a bias for the choice, moved by 0.002 at every step"
    assert "router z-loss" not in rows and "shared expert" not in rows
    best = rows_of(render_model_card(MoEConfig(**SIZES | changes | {"group_scoring_func": "max"}), []))
    assert "groups by their best score," in best["router"]
    for unbalanced in ({"router_balancing": "none"}, {"router_aux_loss_coef": 0.0}):
        assert rows_of(render_model_card(MoEConfig(**SIZES | unbalanced), []))["load balancing"] == "none"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"router_balancing": "sinkhorn"}, {"load balancing": "Sinkhorn's assignment in training (8 iterations)"}),
        ({"router_balancing": "expert_choice"}, {"load balancing": "losses are not causal, and it cannot generate"}),
        (
            {"router_balancing": "loss_free", "router_aux_loss_scope": "sequence", "router_aux_loss_coef": 1e-4},
            {"load balancing": "moved by 0.001 at every step, and a loss with weight 0.0001 (sequence)"},
        ),
        ({"router_balancing": "sinkhorn", "router_jitter_noise": 0.1}, {"router noise": "inputs times 1 ± 0.1"}),
        (
            {"expert_capacity_factor": 1.25, "token_drop_policy": "position"},
            {"expert capacity": "1.25 times the even share, in training, taken by position"},
        ),
        ({}, {"expert capacity": None, "router noise": None}),
    ],
)
def test_card_tells_the_method(changes, expected):
    rows = rows_of(render_model_card(MoEConfig(**SIZES | {"num_experts": 8} | changes), []))
    for name, text in expected.items():
        assert name not in rows if text is None else text in rows[name]


DATA = TrainingData("`a|b.jsonl`", "held out", "packing blocks, at most 64 tokens", "org/corpus")


def test_training_data_appear():
    card = render_model_card(MoEConfig(**SIZES), HISTORY, data=DATA, num_tokens=1_234_567)
    assert "| training | `a\\|b.jsonl` |" in card
    rows = rows_of(card)
    assert (rows["evaluation"], rows["rows"]) == ("held out", "packing blocks, at most 64 tokens")
    assert rows["tokens processed"] == "1,234,567"
    without = render_model_card(MoEConfig(**SIZES), HISTORY)
    assert "Training data" not in without and "tokens processed" not in without


def test_results_are_in_the_metadata_with_what_they_were_measured_on():
    data = ModelCard(render_model_card(MoEConfig(**SIZES), HISTORY, data=DATA)).data
    assert data.datasets == ["org/corpus"]
    results = {result.metric_type: result for result in data.eval_results}
    assert results["loss"].metric_value == 4.84609 and results["perplexity"].metric_value == 127.24268
    assert {result.dataset_name for result in data.eval_results} == {"held out"}
    assert {result.dataset_type for result in data.eval_results} == {"org/corpus"}
    for nothing in (
        render_model_card(MoEConfig(**SIZES), HISTORY),
        render_model_card(MoEConfig(**SIZES), HISTORY[:1], data=DATA),
        render_model_card(MoEConfig(**SIZES), HISTORY, data=replace(DATA, evaluation=None)),
    ):
        assert ModelCard(nothing).data.eval_results is None
    local = ModelCard(render_model_card(MoEConfig(**SIZES), HISTORY, data=replace(DATA, dataset=None))).data
    assert local.datasets is None and local.eval_results[0].dataset_type == "text"


def test_training_settings_appear(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        weight_decay=0.25,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=5,
        seed=77,
    )
    card = render_model_card(MoEConfig(**SIZES), HISTORY, args)
    assert (
        "Learning rate 0.0003, cosine schedule, weight decay 0.25, 6 sequences per device × 5 accumulation steps × "
        "1 processes, seed 77." in card
    )
    assert "Learning rate" not in render_model_card(MoEConfig(**SIZES), HISTORY) and "Layout" not in card
    card = render_model_card(MoEConfig(**SIZES), HISTORY, args, topology=Topology(4, 2, 3, "bfloat16"))
    assert "seed 77. Layout: 4 processes, ZeRO 3, EP 2, bfloat16." in card


def test_header_is_the_model_hubs():
    _, header, rest = render_model_card(MoEConfig(**SIZES), []).split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "moe_hf"],
    }
    assert rest.lstrip().startswith("# ")


# --------------------------------------------------------------------------------------------------------------------
# The card on the hub


def test_words_of_a_card_stay():
    text = '---\ntags:\n- mine\nlanguage: en\n---\n# Ours\n\nLoad "PATH": from_pretrained("PATH", x).\n'
    changed = card_for_repository(text, "org/model", "mit")
    assert changed == (
        '---\ntags:\n- mine\nlanguage: en\nlicense: mit\n---\n# Ours\n\nLoad "PATH": from_pretrained("org/model", x).\n'
    )
    assert card_for_repository(changed, "org/other", "apache-2.0") == changed.replace(
        "license: mit", "license: apache-2.0"
    )
    assert card_for_repository(changed, "org/other") == changed


def test_results_get_the_name_of_the_repository():
    card = render_model_card(MoEConfig(**SIZES), HISTORY, data=DATA)
    before, after = ModelCard(card).data, ModelCard(card_for_repository(card, "org/model")).data
    assert (before.model_name, after.model_name) == ("moe_hf", "model")
    assert before.eval_results == after.eval_results


def test_card_without_metadata_gets_the_models():
    card = ModelCard(card_for_repository("# Ours\n", "org/model", "mit"))
    assert card.text == "# Ours\n"
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "moe_hf"],
        "license": "mit",
    }


@pytest.mark.parametrize("header", ["a: [", "- a list", "1: x", "model-index: 3"])
def test_damaged_metadata_are_refused(header):
    with pytest.raises(ValueError, match=r"its metadata header is damaged \(.*\)\.$") as caught:
        card_for_repository(f"---\n{header}\n---\n# x\n", "org/model")
    assert "\n" not in str(caught.value)
