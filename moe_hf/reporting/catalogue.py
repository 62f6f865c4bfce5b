"""The figures of a report that are made of curves: their panels, and captions that say how each is computed."""

from dataclasses import dataclass

from .curves import SKIPPED_START
from .panels import Panel


@dataclass(frozen=True)
class CurveFigure:
    """A figure made of curves.

    Attributes:
        name: of its file.
        title: the caption's first words.
        caption: the rest of it, as HTML; what the panels mean comes after it.
        panels: the quantities; those that no run has logged are left out.
        num_columns: panels in a row.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    num_columns: int


_MAX_VIO = Panel("MaxVio", "max_vio", over_layers="mean", total="max_vio", evaluation=True, scale="symlog")
_LOAD_ENTROPY = Panel(
    "load entropy",
    "load_entropy",
    over_layers="mean",
    total="load_entropy",
    evaluation=True,
    limits=(None, 1),
    reference=1.0,
)

# Before the heat maps of the loads.
LOSSES = (
    CurveFigure(
        "loss",
        "Loss.",
        "Cross-entropy in nats per token, mean over the unmasked tokens since the last log entry (lines) and over the "
        "whole evaluation set (circles). Router losses are not part of it, except for runs that log the whole loss "
        f"only. The vertical axis is that of the losses after the first {SKIPPED_START:.0%} of training. A cross at "
        "the bottom is an entry whose loss was NaN or infinite.",
        (Panel("", None, "cross-entropy (nats per token)", evaluation=True, cut_start=True),),
        num_columns=1,
    ),
    CurveFigure(
        "router-losses",
        "Router losses,",
        "mean over the sparse layers, before their coefficients. Load-balancing loss: <i>E</i> Σ<sub><i>i</i></sub> "
        "<i>f<sub>i</sub> p<sub>i</sub></i> with the share <i>f<sub>i</sub></i> of assignments that expert <i>i</i> of "
        "<i>E</i> got and its mean router probability <i>p<sub>i</sub></i>; 1 (dashed) when both are uniform "
        "(Fedus et al. 2022, arXiv 2101.03961). Router z-loss: mean over tokens of the squared log-sum-exp of their "
        "logits (Zoph et al. 2022, arXiv 2202.08906).",
        (
            Panel("load-balancing loss", "aux_loss", over_layers="mean", reference=1.0),
            Panel("router z-loss", "z_loss", over_layers="mean"),
        ),
        num_columns=2,
    ),
)

# After them.
DETAILS = (
    CurveFigure(
        "balance",
        "Balance of the load,",
        "mean over the sparse layers; circles are evaluations. With the load <i>c<sub>i</sub></i>, the number of "
        "assignments of expert <i>i</i> of <i>E</i> since the last log entry, MaxVio is max<sub><i>i</i></sub> "
        "<i>c<sub>i</sub></i> / mean<sub><i>i</i></sub> <i>c<sub>i</sub></i> − 1, 0 when balanced (Wang et al. 2024, "
        "arXiv 2408.15664). Load entropy is −Σ<sub><i>i</i></sub> <i>f<sub>i</sub></i> log <i>f<sub>i</sub></i> / log "
        "<i>E</i> with the shares <i>f<sub>i</sub></i> = <i>c<sub>i</sub></i> / Σ<sub><i>j</i></sub> "
        "<i>c<sub>j</sub></i>, 1 (dashed) when uniform. The coefficient of variation is the standard deviation of "
        "<i>c<sub>i</sub></i> over its mean. MaxVio and the coefficient of variation are on a logarithmic axis, linear "
        "below 0.01. Router entropy is the mean over tokens of the entropy of the router’s distribution, divided by "
        "log <i>E</i>: low when the choice for a token is sure.",
        (
            _MAX_VIO,
            _LOAD_ENTROPY,
            Panel(
                "coefficient of variation of the load", "load_cv", over_layers="mean", evaluation=True, scale="symlog"
            ),
            Panel("router entropy", "router_entropy", over_layers="mean"),
        ),
        num_columns=2,
    ),
    CurveFigure(
        "balance-by-layer",
        "Balance by layer,",
        "in the last log entry of training; the quantities are those of the figure before.",
        (
            Panel("MaxVio", "max_vio", by_layer=True, limits=(0, None)),
            Panel("load entropy", "load_entropy", by_layer=True, limits=(None, 1), reference=1.0),
        ),
        num_columns=2,
    ),
    CurveFigure(
        "router-state",
        "State of the routers.",
        "",
        (
            Panel(
                "dead experts",
                "dead_experts",
                over_layers="sum",
                total="dead_experts",
                limits=(0, 1),
                whole=True,
                meaning="Dead experts got no token during the last <code>dead_expert_steps</code> steps; they are "
                "summed over the sparse layers.",
            ),
            Panel(
                "largest router logit",
                "router_logit_max",
                over_layers="max",
                meaning="The largest router logit is the largest absolute value for any token, expert and layer.",
            ),
            Panel(
                "dropped assignments",
                "dropped_fraction",
                "per cent",
                over_layers="mean",
                total="dropped_fraction",
                factor=100.0,
                limits=(0, 1),
                meaning="Dropped is the share of assignments that exceeded the capacity of their expert, mean over the "
                "sparse layers.",
            ),
            Panel(
                "range of router biases",
                "router_bias_max",
                over_layers="mean",
                minus="router_bias_min",
                limits=(0, None),
                meaning="The range of router biases is the largest minus the smallest correction bias of a layer, mean "
                "over the sparse layers.",
            ),
        ),
        num_columns=2,
    ),
    CurveFigure(
        "gradients",
        "Gradient norms and learning rate.",
        "L2 norm of the gradient of the whole batch before clipping: of all parameters, and of each family. The "
        "squares of the families add up to the square of the whole. Logarithmic except for the learning rate.",
        (
            Panel("all parameters", "grad_norm", scale="log"),
            Panel("attention", "grad_norm/attention", scale="log"),
            Panel("dense MLPs", "grad_norm/dense_mlp", scale="log"),
            Panel("experts", "grad_norm/experts", scale="log"),
            Panel("routers", "grad_norm/router", scale="log"),
            Panel("embeddings", "grad_norm/embeddings", scale="log"),
            Panel("norms", "grad_norm/norms", scale="log"),
            Panel("learning rate", "learning_rate", limits=(0, None)),
        ),
        num_columns=4,
    ),
    CurveFigure(
        "attention-sink",
        "Attention sink.",
        "Share of the attention that falls on the first token, mean over heads and over the queries after the first: "
        "mean over all layers along training, and of each layer in the last log entry.",
        (
            Panel("along training", "attention_sink", over_layers="mean", total="attention_sink", limits=(0, None)),
            Panel("by layer", "attention_sink", by_layer=True, limits=(0, None)),
        ),
        num_columns=2,
    ),
    CurveFigure(
        "throughput",
        "Throughput and memory.",
        "Unmasked tokens per second over all devices, without the time for evaluating and saving.",
        (
            Panel("tokens per second", "tokens_per_second", limits=(0, None)),
            Panel(
                "MFU",
                "mfu",
                "per cent",
                factor=100.0,
                limits=(0, None),
                meaning="Model FLOPs utilisation (MFU): the FLOPs that the active parameters and the attention need, "
                "as a share of the devices’ peak.",
            ),
            Panel(
                "peak memory",
                "peak_memory_gib",
                "GiB",
                limits=(0, None),
                meaning="Peak memory is the most that one process has used.",
            ),
        ),
        num_columns=3,
    ),
)
