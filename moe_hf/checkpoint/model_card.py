"""The README of an exported model: what it is, what it was trained on and measured at, how to load it."""

from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainingArguments

from ..configuration_moe import MoEConfig
from .export import expected_tensors
from .topology import Topology

# Stands in the example until the model is on the hub.
_PLACEHOLDER = "PATH"


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: in all, used by one token, and of the latter those in matrices (what FLOPs follow)."""

    total: int
    active: int
    in_matrices: int


@dataclass(frozen=True)
class TrainingData:
    """What a model was trained on, in words for a reader who does not see the files.

    Args:
        training: the training data.
        evaluation: the evaluation data, or `None` if nothing was evaluated.
        rows: how text became rows of tokens.
        dataset: name of the data set on the hub, if it comes from there.
    """

    training: str
    evaluation: str | None
    rows: str
    dataset: str | None = None


def active_parameters(config: MoEConfig) -> ParameterCount:
    """Count the parameters of a model of this configuration; tied embeddings count once in total and active."""
    total = active = in_matrices = 0
    for name, tensor in expected_tensors(config).items():
        if name.endswith("e_score_correction_bias"):
            continue  # a buffer: saved with the model, but not learned by gradients
        count = tensor.numel()
        used = count * config.num_experts_per_tok // config.num_experts if ".mlp.experts." in name else count
        total, active = total + count, active + used
        if tensor.dim() > 1 and (not name.endswith("embed_tokens.weight") or config.tie_word_embeddings):
            in_matrices += used
    return ParameterCount(total, active, in_matrices)


def render_model_card(
    config: MoEConfig,
    log_history: list[dict],
    args: TrainingArguments | None = None,
    *,
    data: TrainingData | None = None,
    topology: Topology | None = None,
    num_tokens: int | None = None,
) -> str:
    """Return the card as Markdown with the metadata header of the model hub.

    Args:
        config: of the model.
        log_history: of the `TrainerState`: the measured losses.
        args: what it was trained with.
        data: what it was trained on.
        topology: how training was laid out over processes.
        num_tokens: how many tokens training has processed, padding included.
    """
    sections = [
        f"---\n{_metadata(log_history, data).to_yaml()}\n---",
        "# A mixture-of-experts language model\n\nTrained with moe_hf on DeepSpeed.",
        _table("Architecture", _architecture(config)),
    ]
    if data is not None:
        sections.append(_table("Training data", _data_rows(data, num_tokens)))
    if measured := _measured(log_history):
        sections.append(_table("Measured in training", measured))
    if args is not None:
        sections.append(f"## Training\n\n{_recipe(args, topology)}")
    sections.append(
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{_PLACEHOLDER}", trust_remote_code=True)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{_PLACEHOLDER}")\n'
        'inputs = tokenizer("def main(", return_tensors="pt")\n'
        f"print({_call(config)})\n```\n\n"
        "The folder carries the code of its own classes; with `import moe_hf` it loads without `trust_remote_code`."
    )
    return "\n\n".join(sections) + "\n"


def _call(config: MoEConfig) -> str:
    if config.num_sparse_layers and config.router_balancing == "expert_choice":
        return "model(**inputs).logits"
    return "tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0])"


def card_for_repository(text: str, repo_id: str, license: str | None = None) -> str:
    """Return a card as it is to be read at `repo_id` on the hub; its words stay as they are.

    Args:
        text: of the card, with or without a metadata header.
        repo_id: put into the example instead of the placeholder, and into the metadata as the model's name.
        license: put into the metadata; `None` leaves what is there.

    Raises:
        ValueError: the metadata header is not YAML, or holds no mapping.
    """
    try:
        card = ModelCard(
            text if text.lstrip().startswith("---") else f"---\n{_metadata([], None).to_yaml()}\n---\n{text}"
        )
    except Exception as error:  # of the YAML parser, which is not among our imports
        raise ValueError(f"its metadata header is damaged ({' '.join(str(error).split())}).") from error
    if license is not None:
        card.data.license = license
    if card.data.eval_results:
        card.data.model_name = repo_id.split("/")[-1]
    card.text = card.text.replace(f'from_pretrained("{_PLACEHOLDER}"', f'from_pretrained("{repo_id}"')
    return card.content


def _metadata(log_history: list[dict], data: TrainingData | None) -> ModelCardData:
    measured = [entry for entry in log_history if "eval_loss" in entry]
    evaluated = {}
    if data is not None and data.evaluation is not None and measured:
        # The hub takes results only together with the name of what they were measured on.
        common = {
            "task_type": "text-generation",
            "dataset_type": data.dataset or "text",
            "dataset_name": data.evaluation,
        }
        results = [
            EvalResult(**common, metric_type=kind, metric_name=name, metric_value=round(measured[-1][key], 5))
            for key, kind, name in (
                ("eval_loss", "loss", "cross-entropy"),
                ("eval_perplexity", "perplexity", "perplexity"),
            )
            if key in measured[-1]
        ]
        evaluated = {"model_name": "moe_hf", "eval_results": results}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", "moe_hf"],
        datasets=[data.dataset] if data is not None and data.dataset is not None else None,
        **evaluated,
    )


def _table(title: str, rows: dict[str, str]) -> str:
    # A bar would end the cell; it may come from the name of a file.
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join([f"## {title}\n\n| | |\n|---|---|", *lines])


def _architecture(config: MoEConfig) -> dict[str, str]:
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
    if not config.num_sparse_layers:
        return rows
    rows["experts"] = (
        f"{config.num_experts} of width {config.moe_intermediate_size:,}, {config.num_experts_per_tok} per token"
    )
    if config.shared_expert_intermediate_size:
        gate = ", weighed by a sigmoid gate" if config.shared_expert_gate else ""
        rows["shared expert"] = f"width {config.shared_expert_intermediate_size:,}{gate}"
    return rows | {"router": _router(config), "load balancing": _balancing(config)} | _further_routing(config)


def _router(config: MoEConfig) -> str:
    parts = [f"{config.scoring_func} scores"]
    if config.n_group > 1:
        worth = {"top2_sum": "the sum of their two best scores", "max": "their best score"}[config.group_scoring_func]
        parts.append(f"the best {config.topk_group} of {config.n_group} groups by {worth}")
    sums_to_1 = config.norm_topk_prob and config.router_balancing != "expert_choice"
    parts.append("weights of a token sum to 1" if sums_to_1 else "weights are the scores")
    if config.routed_scaling_factor != 1:
        parts.append(f"times {config.routed_scaling_factor}")
    return ", ".join(parts)


def _balancing(config: MoEConfig) -> str:
    has_loss = config.has_balancing_loss and config.router_aux_loss_coef
    loss = f"loss with weight {config.router_aux_loss_coef} ({config.router_aux_loss_scope})" if has_loss else "none"
    if config.router_balancing == "loss_free":
        bias = f"a bias for the choice, moved by {config.router_bias_update_speed} at every step"
        return f"{bias}, and a {loss}" if has_loss else f"without a loss: {bias}"
    if config.router_balancing == "sinkhorn":
        return f"Sinkhorn's assignment in training ({config.sinkhorn_iterations} iterations), plain top-k otherwise"
    if config.router_balancing == "expert_choice":
        return "experts choose among all tokens, later ones included: losses are not causal, and it cannot generate"
    return loss


def _further_routing(config: MoEConfig) -> dict[str, str]:
    rows = {}
    if config.router_balancing == "expert_choice":
        rows["expert capacity"] = f"{config.expert_capacity_factor or 1.0} times the even share"
    elif config.expert_capacity_factor is not None:
        share = f"{config.expert_capacity_factor} times the even share"
        rows["expert capacity"] = f"{share}, in training, taken by {config.token_drop_policy}"
    if config.router_jitter_noise:
        rows["router noise"] = f"inputs times 1 ± {config.router_jitter_noise}, in training"
    if config.router_z_loss_coef:
        rows["router z-loss"] = f"weight {config.router_z_loss_coef}"
    return rows


def _data_rows(data: TrainingData, num_tokens: int | None) -> dict[str, str]:
    rows = {"training": data.training}
    if data.evaluation is not None:
        rows["evaluation"] = data.evaluation
    rows["rows"] = data.rows
    if num_tokens:
        rows["tokens processed"] = f"{num_tokens:,}"
    return rows


def _recipe(args: TrainingArguments, topology: Topology | None) -> str:
    readers = args.world_size if topology is None else topology.num_data_ranks
    shared = args.world_size // readers
    processes = f"{readers} " + ("processes" if shared == 1 else f"groups of {shared} processes")
    text = (
        f"Learning rate {args.learning_rate}, {args.lr_scheduler_type.value} schedule, "
        f"weight decay {args.weight_decay}, "
        f"{args.per_device_train_batch_size} sequences per device × {args.gradient_accumulation_steps} "
        f"accumulation steps × {processes}, seed {args.seed}."
    )
    return text if topology is None else f"{text} Layout: {topology.describe()}."


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
            ("output_z_loss", "z-loss of the predictions"),
            ("aux_loss", "load-balancing loss"),
            ("z_loss", "z-loss"),
        ):
            if key in last:
                rows[name] = f"{last[key]:.4f}"
    if evaluation:
        rows["evaluation loss"] = f"{evaluation[-1]['eval_loss']:.4f}"
        rows["evaluation perplexity"] = f"{evaluation[-1]['eval_perplexity']:.3f}"
    return rows
