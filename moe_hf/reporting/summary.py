"""The table at the head of a report: one row for each run, with where it ended."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .panels import Panel
from .runs import Run

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, and one text for each run."""

    heading: str
    cells: list[str]
    is_number: bool = True


def summarize(runs: Sequence[Run]) -> list[Column]:
    """Return the columns after the run's name, without those of which no run has anything."""
    columns = [
        Column("Balancing", [_balancing(run) for run in runs], is_number=False),
        Column("Capacity", [_capacity(run) for run in runs], is_number=False),
        Column("Steps", [_count(_end(run, "step")) for run in runs]),
        Column("Tokens", [_tokens(_end(run, "num_tokens")) for run in runs]),
        Column("Training loss", [_number(run.training.last(run.loss_key), 4) for run in runs]),
        Column("Eval. loss", [_number(run.evaluations.last("eval_loss"), 4) for run in runs]),
        Column("MaxVio", [_number(_last_of_layers(run, "max_vio", "mean"), 3) for run in runs]),
        Column("Load entropy", [_number(_last_of_layers(run, "load_entropy", "mean"), 4) for run in runs]),
        Column("Dead experts", [_count(_last_of_layers(run, "dead_experts", "sum")) for run in runs]),
        Column("Dropped", [_percent(_last_of_layers(run, "dropped_fraction", "mean")) for run in runs]),
        Column("Tokens/s", [_count(_median(run, "tokens_per_second")) for run in runs]),
    ]
    return [column for column in columns if any(cell != MISSING for cell in column.cells)]


def as_markdown(runs: Sequence[Run]) -> str:
    """Return the same table in Markdown, aligned so that a terminal shows it as well."""
    columns = [Column("Run", [run.name for run in runs], is_number=False), *summarize(runs)]
    widths = [max(3, *map(len, [column.heading, *column.cells])) for column in columns]
    headings = [_aligned(column.heading, width, column) for column, width in zip(columns, widths, strict=True)]
    rules = [(width - 1) * "-" + (":" if c.is_number else "-") for c, width in zip(columns, widths, strict=True)]
    rows = [
        [_aligned(column.cells[place], width, column) for column, width in zip(columns, widths, strict=True)]
        for place in range(len(runs))
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, rules, *rows])


def _aligned(text: str, width: int, column: Column) -> str:
    return text.rjust(width) if column.is_number else text.ljust(width)


def _end(run: Run, key: str) -> float | None:
    ends = [end for table in (run.training, run.evaluations) if (end := table.last(key)) is not None]
    return max(ends, default=None)


def _last_of_layers(run: Run, key: str, over_layers: str) -> float | None:
    curve = Panel("", key, over_layers=over_layers, total=key).training(run)
    return None if curve is None else float(curve[-1])


def _median(run: Run, key: str) -> float | None:
    column = run.training.column(key)
    return None if column is None or not np.isfinite(column).any() else float(np.nanmedian(column))


def _balancing(run: Run) -> str:
    if run.config.get("num_experts") == 0 or "sparse" not in (run.config.get("mlp_layer_types") or ["sparse"]):
        return "dense"
    method = run.config.get("router_balancing")
    if not isinstance(method, str):
        return MISSING
    scope = run.config.get("router_aux_loss_scope")
    return f"{method} ({scope})" if method == "aux_loss" and scope else method


def _capacity(run: Run) -> str:
    factor, policy = run.config.get("expert_capacity_factor"), run.config.get("token_drop_policy")
    if not isinstance(factor, (int, float)) or _balancing(run) == "dense":
        return MISSING
    return f"{factor:g} ({policy})" if policy else f"{factor:g}"


def _number(value: float | None, decimals: int) -> str:
    return MISSING if value is None else f"{value:.{decimals}f}" if np.isfinite(value) else "not finite"


def _count(value: float | None) -> str:
    return MISSING if value is None or not np.isfinite(value) else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return MISSING if value is None or not np.isfinite(value) else f"{100 * value:.2f} %"


def _tokens(value: float | None) -> str:
    """Write a number of tokens with three digits, such as 1.23 B."""
    if value is None or not np.isfinite(value):
        return MISSING
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}" if value < 999.5 * unit else f"{value / unit:.0f} {name}"
    return f"{value:.0f}"
