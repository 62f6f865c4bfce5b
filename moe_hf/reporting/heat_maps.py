"""Heat maps of the experts' load, over the layers and over time.

A load is shown relative to the mean of its layer, on a logarithmic scale centred at 1, so that an expert with twice its
share is as far from white as one with half of it. An expert without any token is black.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from .panels import thin
from .runs import Run
from .style import STYLE, WIDTH, TimeAxis, short_names, wrapped, write_plainly

# Layers of which the load over time is shown; of deeper models a selection.
MAX_LAYERS = 4
NUM_SLICES = 5
_MAX_COLUMNS = 160

_NORM = LogNorm(1 / 4, 4)
_NOTHING = 1e-9  # stands for 0, which has no logarithm: under every load that is shown
_TICKS = {1 / 4: "¼", 1 / 2: "½", 1: "1", 2: "2", 4: "4"}
# Blue for too little and red for too much, without the darkest ends, which one could take for the black of no token.
_COLOURS = LinearSegmentedColormap.from_list("load", colormaps["RdBu_r"](np.linspace(0.1, 0.9, 256)))
_COLOURS = _COLOURS.with_extremes(under="black", bad="#D9D9D9")


def heat_map(loads: np.ndarray, layer_names: list[str], title: str) -> Figure:
    """Draw the load of every expert in every layer.

    Args:
        loads: counts or shares of the layers' assignments, of shape (L, E); NaN where there is none.
        layer_names: a name for each of the L rows.
        title: above the picture.

    Returns:
        A figure that belongs to no window and to no global state; `figure.savefig(path, dpi=…)` writes it.
    """
    num_layers, num_experts = loads.shape
    width = float(np.clip(1.6 + 0.16 * num_experts, 4.2, 9.0))
    height = float(np.clip(1.1 + 0.22 * num_layers, 1.7, 9.0))
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        _draw_layers(axes, loads)
        shown = _evenly(num_layers, most=int(height / 0.14))
        axes.set_yticks(shown, [layer_names[place] for place in shown])
        for label in axes.get_yticklabels():
            write_plainly(label)
        axes.set_xlabel("expert")
        write_plainly(axes.set_title(wrapped(title, int(width * 13))))
        _draw_scale(figure, axes)
    return figure


def draw_load_over_time(runs: Sequence[Run], axis: TimeAxis) -> Figure:
    """Draw the load of every expert along time: a row for each run, a panel for each of at most `MAX_LAYERS` layers.

    Args:
        runs: those that have logged loads while training.
        axis: along which they are aligned.
    """
    end = axis.end(runs)
    with rc_context({**STYLE, "axes.grid": False}):
        figure, grid = _grid(runs, [len(shown_layers(run)) for run in runs])
        for run, row in zip(runs, grid, strict=True):
            for axes, layer in zip(row, shown_layers(run), strict=True):
                _draw_over_time(axes, axis.of(run.training), run.training.loads[layer])
                axes.set_title(f"layer {layer}")
                axes.set_xlim(0, end)
                axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        _label_outside(grid, axis.label, "expert")
    return figure


def draw_load_by_layer(runs: Sequence[Run], axis: TimeAxis) -> Figure:
    """Draw the load of every expert in every layer: a row for each run, a panel for each of `NUM_SLICES` moments.

    Args:
        runs: those that have logged loads while training.
        axis: along which they are aligned: the moments are the same for all.
    """
    moments = slice_times(runs, axis)
    with rc_context({**STYLE, "axes.grid": False}):
        figure, grid = _grid(runs, [len(moments)] * len(runs))
        for run, row in zip(runs, grid, strict=True):
            for axes, moment in zip(row, moments, strict=True):
                _draw_slice(axes, run, axis, moment)
        _label_outside(grid, "expert", "layer")
    return figure


def shown_layers(run: Run) -> list[int]:
    """Return the layers of which the load over time is shown: all, or the first, the last and some in between."""
    layers = list(run.training.loads)
    return [layers[place] for place in _evenly(len(layers), MAX_LAYERS)]


def slice_times(runs: Sequence[Run], axis: TimeAxis) -> np.ndarray:
    """Return the moments shown of all runs: evenly spaced from the first entry to the end of the longest run."""
    first = min(float(np.nanmin(axis.of(run.training))) for run in runs)
    return np.linspace(first, axis.end(runs), NUM_SLICES)


def _grid(runs: Sequence[Run], num_columns: Sequence[int]) -> tuple[Figure, list[np.ndarray]]:
    """Return a figure with a row of panels and a scale for each run, below its name where there are several."""
    # Eight runs still fit on one printed page.
    row_height = 1.75 if len(runs) == 1 else float(np.clip(9 / len(runs), 0.95, 1.3))
    figure = Figure(figsize=(WIDTH, row_height * len(runs) + 0.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
    rows = figure.subfigures(len(runs), 1, squeeze=False).ravel()
    grid = [row.subplots(1, number, squeeze=False).ravel() for row, number in zip(rows, num_columns, strict=True)]
    for row, panels, name in zip(rows, grid, short_names(runs, width=90), strict=True):
        _draw_scale(row, list(panels))
        if len(runs) > 1:
            write_plainly(row.suptitle(name, x=0.008, ha="left", fontsize=8, fontweight="bold"))
    return figure, grid


def _draw_over_time(axes: Axes, x: np.ndarray, loads: np.ndarray) -> None:
    """Draw loads of shape (T, E): an entry covers the time since the one before it."""
    known = np.isfinite(loads).any(axis=1) & np.isfinite(x)
    x, loads = thin(x[known], loads[known].astype(np.float64), most=_MAX_COLUMNS)
    start = max(0.0, x[0] - (x[1] - x[0])) if len(x) > 1 else 0.0
    edges = np.concatenate([[start], x])
    experts = np.arange(loads.shape[1] + 1) - 0.5
    axes.pcolormesh(edges, experts, _relative(loads).T, cmap=_COLOURS, norm=_NORM, rasterized=True)
    axes.invert_yaxis()


def _draw_slice(axes: Axes, run: Run, axis: TimeAxis, moment: float) -> None:
    x = axis.of(run.training)
    layers = run.training.loads
    # Rounding of the axis' unit must not push the last entry over the last moment.
    reached = np.flatnonzero(x >= moment * (1 - 1e-9))
    if reached.size == 0:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.text(0.5, 0.5, "ended", ha="center", va="center", color="#777777", transform=axes.transAxes)
        return
    num_experts = max(loads.shape[1] for loads in layers.values())
    loads = np.full((len(layers), num_experts), np.nan)
    for row, of_layer in enumerate(layers.values()):
        loads[row, : of_layer.shape[1]] = of_layer[reached[0]]
    _draw_layers(axes, loads)
    shown = _evenly(len(layers), 6)
    axes.set_yticks(shown, [str(list(layers)[place]) for place in shown])
    axes.set_title(f"{x[reached[0]]:.3g} {_unit(axis)}")


def _unit(axis: TimeAxis) -> str:
    """Return what follows a number on this axis, such as `M tokens`."""
    prefix = {1e3: "k ", 1e6: "M ", 1e9: "B ", 1e12: "T "}.get(axis.unit, "")
    return f"{prefix}{'tokens' if axis.key == 'num_tokens' else 'steps'}"


def _draw_layers(axes: Axes, loads: np.ndarray) -> None:
    axes.imshow(_relative(loads), cmap=_COLOURS, norm=_NORM, aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _relative(loads: np.ndarray) -> np.ndarray:
    """Divide each row by its mean, within the limits of the scale; what got nothing is under them all."""
    known = np.isfinite(loads)
    total = np.where(known, loads, 0).sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = loads * known.sum(axis=1, keepdims=True) / total
    shown = np.where(relative > 0, np.clip(relative, _NORM.vmin, _NORM.vmax), _NOTHING)
    return np.ma.array(shown, mask=~np.isfinite(relative))


def _evenly(number: int, most: int) -> list[int]:
    """Return at most `most` places out of `number`, with the first and the last."""
    return sorted({int(place) for place in np.linspace(0, number - 1, min(number, max(most, 1))).round()})


def _label_outside(grid: Sequence[np.ndarray], x_label: str, y_label: str) -> None:
    for axes in grid[-1]:
        if axes.images or axes.collections:
            axes.set_xlabel(x_label)
    for row in grid:
        row[0].set_ylabel(y_label)
        for axes in row[1:]:
            axes.tick_params(labelleft=False)


def _draw_scale(figure: Figure | SubFigure, axes: Axes | list[Axes]) -> None:
    bar = figure.colorbar(
        ScalarMappable(_NORM, _COLOURS), ax=axes, extend="min", extendfrac=0.06, pad=0.015, fraction=0.03, aspect=22
    )
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_locator(FixedLocator(list(_TICKS)))
    bar.ax.set_yticklabels(_TICKS.values())
    bar.set_label("load / mean load")
