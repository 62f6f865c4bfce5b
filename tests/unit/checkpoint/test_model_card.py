"""The numbers on a model card, counted by hand."""

import pytest
import yaml
from transformers import TrainingArguments

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.checkpoint.model_card import active_parameters, render_model_card

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


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
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
    assert rows["router losses"] == "load balancing 0.01 (global), z-loss 0.001"
    dense = rows_of(render_model_card(MoEConfig(vocab_size=100, num_experts=0), []))
    assert "experts" not in dense and "router losses" not in dense


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
    assert "Learning rate" not in render_model_card(MoEConfig(**SIZES), HISTORY)


def test_header_is_the_model_hubs():
    _, header, rest = render_model_card(MoEConfig(**SIZES), []).split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "moe_hf"],
    }
    assert rest.lstrip().startswith("# ")
