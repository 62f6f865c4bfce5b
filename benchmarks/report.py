"""One Markdown table of all rows, and what has to be known to read it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .profile_suite import KINDS
from .results import MEASURED, Row
from .timing import Ratio

FLOPS_NOTE = (
    "TFLOP/s: forward and backward are 6 FLOPs for each token and parameter of the matrices that it passes (the "
    "router, its k experts, and in whole models attention's projections and the head) + 6·L·H·S of causal attention "
    "for each token (L layers, H heads times their size, S tokens of a sequence); recomputation is not counted. "
    "Of ceiling: share of the rate of one dense matrix product of the same FLOPs in the same rounds. "
    "Saved: bytes that autograd keeps for backward over the minimum, (2H + 4KI) bytes in 16 bits. "
    "Ours is: how many times less time ours takes, median over rounds [quartiles]."
)


@dataclass(frozen=True)
class _Column:
    title: str
    show: Callable[[Row], str]


def _number(metric: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.values.get(metric)
        return "" if value is None else format(value * scale, form)

    return show


def _either(one: Callable[[Row], str], other: Callable[[Row], str]) -> Callable[[Row], str]:
    return lambda row: one(row) or other(row)


def _speed(row: Row) -> str:
    for metric in ("step_ms", "forward_backward_ms"):
        if (ratio := row.ratios.get(metric)) is not None:
            return _spread(ratio)
    return ""


def _spread(ratio: Ratio) -> str:
    return f"{ratio.median:.2f}× [{ratio.lower:.2f}, {ratio.upper:.2f}]"


_COLUMNS = (
    _Column("suite", lambda row: row.suite),
    _Column("config", lambda row: row.config),
    _Column("dtype", lambda row: row.dtype),
    _Column("routing", lambda row: row.routing),
    _Column("peer", lambda row: row.peer),
    _Column("forward ms", _number("forward_ms", ".2f")),
    _Column("forward + backward ms", _number("forward_backward_ms", ".2f")),
    _Column("step ms", _number("step_ms", ".1f")),
    _Column("tokens/s", _number("tokens_per_second", ",.0f")),
    _Column("TFLOP/s", _number("tflops", ".3g")),
    _Column("of ceiling", _number("ceiling_share", ".1%")),
    _Column("peak MiB", _number("peak_bytes", ",.0f", 2**-20)),
    _Column("saved / minimum", _number("saved_over_minimum", ".2f")),
    _Column("operators", _number("operators", ",.0f")),
    _Column("synchronisations", _number("synchronisations", ",.0f")),
    _Column("slope of time", _number("time_slope", ".2f")),
    _Column("slope of held bytes", _number("held_slope", ".2f")),
    _Column("slope of peak bytes", _number("peak_slope", ".2f")),
    *(_Column(kind, _number(f"share_of_{kind}", ".1%")) for kind in KINDS),
    _Column("rate of products, of ceiling", _number("products_of_ceiling", ".0%")),
    _Column("bytes", _number("bytes", ",.0f")),
    _Column("formula", _either(_number("formula_bytes", ",.0f"), _number("sent_formula_bytes", ",.0f"))),
    _Column("bytes / formula", _either(_number("over_formula", ".4f"), _number("sent_over_formula", ".4f"))),
    _Column("bytes / ideal", _number("over_ideal", ".3f")),
    _Column("bytes sent", _number("sent_bytes", ",.0f")),
    _Column("ours is", _speed),
    _Column("largest relative error", _number("max_error", ".1e")),
    _Column("note", lambda row: "" if row.status == MEASURED else f"{row.status}: {row.reason}"),
)


def markdown_table(rows: Iterable[Row]) -> str:
    """Return the table; columns that no row fills are left out."""
    rows = list(rows)
    cells = [[_escape(column.show(row)) for column in _COLUMNS] for row in rows]
    used = [i for i in range(len(_COLUMNS)) if any(line[i] for line in cells)]
    titles = [_COLUMNS[i].title for i in used]
    lines = [titles, ["---"] * len(used), *([line[i] for i in used] for line in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
