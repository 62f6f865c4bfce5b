"""One quantity of a figure: which entries of a log it is made of, and how its axis is to look."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .runs import Run, Table

# More points than a printed panel can show: consecutive entries beyond are averaged.
MAX_POINTS = 400

_REDUCE = {"mean": np.nanmean, "max": np.nanmax, "sum": np.nansum}


@dataclass(frozen=True)
class Panel:
    """One quantity of a figure.

    Attributes:
        title: what it is called.
        key: of the log entries, or the part before `/layer_N`. `None`: the training loss.
        unit: label of the y axis.
        over_layers: how the layers become one number: `"mean"`, `"max"` or `"sum"`; `None` where it has no layers.
        total: the key of this number in logs that have no layers; `None` where there is none.
        minus: a key whose values are subtracted, layer by layer.
        evaluation: whether `eval_` and the key is drawn too.
        by_layer: draw the last entry over the layers, instead of all entries over time.
        factor: on the values, 100 for per cent.
        scale: of the y axis: `"linear"`, `"log"`, or `"symlog"`, which is logarithmic but has a place for 0.
        whole: the values are whole numbers.
        limits: where the y axis begins, and where it ends at least; `None` leaves an end to the data.
        reference: a value to compare with, drawn as a dashed line.
        cut_start: leave the beginning of training out of the range of the y axis.
        meaning: HTML for the caption of a figure that shows this panel.
    """

    title: str
    key: str | None
    unit: str = ""
    over_layers: str | None = None
    total: str | None = None
    minus: str | None = None
    evaluation: bool = False
    by_layer: bool = False
    factor: float = 1.0
    scale: str = "linear"
    whole: bool = False
    limits: tuple[float | None, float | None] = (None, None)
    reference: float | None = None
    cut_start: bool = False
    meaning: str = ""

    def layer_values(self, run: Run) -> np.ndarray | None:
        """Return what training logged of each layer, of shape (T, L), or `None`."""
        values = _layer_values(run.training, self.key, self.minus)
        return None if values is None else values * self.factor

    def training(self, run: Run) -> np.ndarray | None:
        """Return the curve of training, of shape (T,), or `None` where the run has none."""
        return self._curve(run.training, self.key or run.loss_key, self.total)

    def evaluations(self, run: Run) -> np.ndarray | None:
        """Return the curve of the evaluations, of shape (T,), or `None` where the run has none."""
        if not self.evaluation:
            return None
        return self._curve(run.evaluations, f"eval_{self.key or 'loss'}", self.total and f"eval_{self.total}")

    def is_in(self, run: Run) -> bool:
        """Whether the run has anything to draw here."""
        if self.by_layer:
            values = self.layer_values(run)
            return values is not None and values.shape[1] > 1 and bool(np.isfinite(values[-1]).any())
        return any(
            curve is not None and np.isfinite(curve).any() for curve in (self.training(run), self.evaluations(run))
        )

    def last(self, run: Run) -> float:
        """Return the last finite value of the curve, NaN where there is none."""
        for curve in (self.training(run), self.evaluations(run)):
            if curve is not None and np.isfinite(curve).any():
                return float(curve[np.isfinite(curve)][-1])
        return float("nan")

    def _curve(self, table: Table, key: str, total: str | None) -> np.ndarray | None:
        if self.over_layers is None:
            column = table.column(key)
        else:
            layers = _layer_values(table, key, self.minus)
            if layers is not None:
                return over_finite(_REDUCE[self.over_layers], layers) * self.factor
            column = table.column(total) if total else None
        return None if column is None else column * self.factor


def _layer_values(table: Table, key: str | None, minus: str | None) -> np.ndarray | None:
    values = None if key is None else table.by_layer(key)
    if values is not None and minus is not None:
        subtracted = table.by_layer(minus)
        values = values - subtracted if subtracted is not None and subtracted.shape == values.shape else None
    return values


def over_finite(reduce: Callable, layers: np.ndarray) -> np.ndarray:
    """Reduce each row of (T, L) to one number, NaN where the row has none."""
    result = np.full(len(layers), np.nan)
    rows = np.isfinite(layers).any(axis=1)
    result[rows] = reduce(layers[rows], axis=1)
    return result


def thin(x: np.ndarray, *curves: np.ndarray, most: int = MAX_POINTS) -> list[np.ndarray]:
    """Average consecutive entries, as few as leave at most `most` points; NaN counts only where all are NaN.

    Args:
        x: places of the entries, of shape (T,), rising.
        curves: arrays of shape (T, …).
        most: number of points to leave.

    Returns:
        The places of the last entry of each group, and the groups' means.
    """
    group = -(-len(x) // most) if len(x) else 1
    if group == 1:
        return [x, *curves]
    starts = range(0, len(x), group)
    places = np.array([x[min(start + group, len(x)) - 1] for start in starts])
    return [places, *(np.stack([_finite_mean(curve[start : start + group]) for start in starts]) for curve in curves)]


def _finite_mean(rows: np.ndarray) -> np.ndarray:
    finite = np.isfinite(rows)
    count = finite.sum(axis=0)
    return np.where(count > 0, np.where(finite, rows, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)
