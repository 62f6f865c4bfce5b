"""One row for each peer of each case, and what a file of results holds."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .peers.registry import OURS
from .timing import Ratio, reason_of

MEASURED, FAILED, UNAVAILABLE = "measured", "failed", "unavailable"

# Of these more is better; of all other numbers that are compared, less.
_MORE_IS_BETTER = {"tokens_per_second", "tflops", "ceiling_share", "products_of_ceiling"}
_NOT_COMPARED = {"max_error", "imbalance", "sent_formula_bytes", "sent_over_formula"}


@dataclass
class Row:
    """What is known of one peer in one case.

    Args:
        suite: name of the suite.
        config: name of the case.
        peer: name of the peer.
        dtype: of weights and tokens.
        routing: `"skewed"` or `"balanced"`, where that is a choice.
        status: `MEASURED`, `FAILED` or `UNAVAILABLE`.
        reason: why it was not measured.
        values: numbers by metric.
        ratios: how many times better ours is, from rounds, by metric.
    """

    suite: str
    config: str
    peer: str
    dtype: str = ""
    routing: str = ""
    status: str = MEASURED
    reason: str | None = None
    values: dict[str, float | None] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)

    @property
    def case(self) -> tuple[str, ...]:
        """What rows that are compared have in common."""
        return self.suite, self.config, self.dtype, self.routing

    def fail(self, reason: str) -> None:
        """Write down why there is no result."""
        self.status, self.reason = FAILED, reason

    @contextmanager
    def recording_failure(self) -> Iterator[None]:
        """Take whatever another library raises within for the result of this measurement, and go on behind it."""
        try:
            yield
        except Exception as error:
            self.fail(reason_of(error))


def settled(rows: Iterable[Row], metric: str) -> list[Row]:
    """Return those that have the metric or the reason why not; a run that ends early has no more to tell."""
    return [row for row in rows if row.status != MEASURED or metric in row.values]


def as_json(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """Yield one object for each metric of each row, beside the value of ours; one for a row without numbers.

    `ratio` says how many times better ours is. That of times is the median over rounds, with its quartiles; that of a
    formula is what was measured over what it says.
    """
    rows = list(rows)
    ours = {row.case: row.values for row in rows if row.peer == OURS}
    for row in rows:
        common = {"suite": row.suite, "config": row.config, "dtype": row.dtype, "routing": row.routing}
        common |= {"peer_name": row.peer, "status": row.status, "reason": row.reason}
        if row.status != MEASURED:
            yield common | {"metric": None, "ours": None, "peer": None, "ratio": None}
            continue
        if "formula_bytes" in row.values:
            found = {"metric": "bytes", "ours": row.values["bytes"], "peer": row.values["formula_bytes"]}
            ideal = {"over_ideal": row.values["over_ideal"]} if "over_ideal" in row.values else {}
            yield common | found | {"ratio": row.values["over_formula"]} | ideal
            continue
        for metric, value in row.values.items():
            own = ours.get(row.case, {}).get(metric)
            found = {"metric": metric, "ours": own, "peer": value, "ratio": _ratio(metric, own, value)}
            if (ratio := row.ratios.get(metric)) is not None:
                found |= {"ratio": ratio.median, "lower": ratio.lower, "upper": ratio.upper, "rounds": ratio.rounds}
            yield common | found


def _ratio(metric: str, ours: float | None, peer: float | None) -> float | None:
    if metric in _NOT_COMPARED or metric.startswith("share_of_") or not ours or not peer:
        return None
    return ours / peer if metric in _MORE_IS_BETTER else peer / ours
