"""The README of an exported model: what it is, what it was measured at, how to load it."""

from dataclasses import dataclass

from transformers import TrainingArguments

from ..configuration_moe import MoEConfig
from .export import expected_tensors


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: in all, used by one token, and of the latter those in matrices (what FLOPs follow)."""

    total: int
    active: int
    in_matrices: int


def active_parameters(config: MoEConfig) -> ParameterCount:
    """Count the parameters of a model of this configuration; tied embeddings count once in total and active."""
    total = active = in_matrices = 0
    for name, tensor in expected_tensors(config).items():
        count = tensor.numel()
        used = count * config.num_experts_per_tok // config.num_experts if ".mlp.experts." in name else count
        total, active = total + count, active + used
        if tensor.dim() > 1 and (not name.endswith("embed_tokens.weight") or config.tie_word_embeddings):
            in_matrices += used
    return ParameterCount(total, active, in_matrices)


def render_model_card(config: MoEConfig, log_history: list[dict], args: TrainingArguments | None = None) -> str:
    """Return the card as Markdown with the metadata header of the model hub.

    Args:
        config: of the model.
        log_history: of the `TrainerState`: the measured losses.
        args: what it was trained with.
    """
    count = active_parameters(config)
    rows = {
        "parameters": f"{count.total:,} in all, {count.active:,} active for one token",
        "layers": f"{config.num_hidden_layers}, of which {config.num_sparse_layers} are mixtures of experts",
        "hidden size": f"{config.hidden_size:,}",
        "attention": f"{config.num_attention_heads} heads, {config.num_key_value_heads} key-value heads, "
        f"head size {config.head_dim}",
        "vocabulary": f"{config.vocab_size:,}",
        "longest sequence": f"{config.max_position_embeddings:,} tokens",
    }
    if config.num_sparse_layers:
        rows["experts"] = (
            f"{config.num_experts} of width {config.moe_intermediate_size:,}, {config.num_experts_per_tok} per token"
        )
        rows["router losses"] = (
            f"load balancing {config.router_aux_loss_coef} ({config.router_aux_loss_scope}), "
            f"z-loss {config.router_z_loss_coef}"
        )
    measured = _measured(log_history)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    results = "\n".join(f"| {name} | {value} |" for name, value in measured.items())
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- mixture-of-experts\n- moe_hf\n---",
        "# A mixture-of-experts language model\n\nTrained with moe_hf on DeepSpeed.",
        f"## Architecture\n\n| | |\n|---|---|\n{table}",
    ]
    if measured:
        sections.append(f"## Measured in training\n\n| | |\n|---|---|\n{results}")
    if args is not None:
        sections.append(
            "## Training\n\n"
            f"Learning rate {args.learning_rate}, {args.lr_scheduler_type.value} schedule, "
            f"weight decay {args.weight_decay}, "
            f"{args.per_device_train_batch_size} sequences per device × {args.gradient_accumulation_steps} "
            f"accumulation steps × {args.world_size} processes, seed {args.seed}."
        )
    sections.append(
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        'inputs = tokenizer("def main(", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n```\n\n"
        "The folder carries the code of its own classes; with `import moe_hf` it loads without `trust_remote_code`."
    )
    return "\n\n".join(sections) + "\n"


def _measured(log_history: list[dict]) -> dict[str, str]:
    training = [entry for entry in log_history if "loss" in entry]
    evaluation = [entry for entry in log_history if "eval_loss" in entry]
    rows = {}
    if training:
        last = training[-1]
        rows["steps"] = f"{last['step']:,}"
        rows["training loss"] = (
            f"{training[0]['loss']:.4f} at step {training[0]['step']}, {last['loss']:.4f} at the end"
        )
        for key, name in (
            ("ce_loss", "training cross-entropy"),
            ("aux_loss", "load-balancing loss"),
            ("z_loss", "z-loss"),
        ):
            if key in last:
                rows[name] = f"{last[key]:.4f}"
    if evaluation:
        rows["evaluation loss"] = f"{evaluation[-1]['eval_loss']:.4f}"
        rows["evaluation perplexity"] = f"{evaluation[-1]['eval_perplexity']:.3f}"
    return rows
