"""Panels of curves: one quantity each, a line for every run, along tokens seen or over the layers."""

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator

from .panels import Panel, over_finite, thin
from .runs import Run
from .style import STYLE, WIDTH, TimeAxis, mark_panels, run_colour, run_dashes, short_names, write_plainly

# With more runs than this the ranges over layers would cover each other.
MAX_BANDS = 3
# A `"symlog"` axis is linear here.
LINEAR_BELOW = 0.01
# The first share of a run, whose losses would flatten all others.
SKIPPED_START = 0.05


def draw_curves(runs: Sequence[Run], axis: TimeAxis, panels: Sequence[Panel], num_columns: int) -> Figure:
    """Draw panels side by side, each with a line for every run that has its quantity.

    Args:
        runs: all runs of the report: a run's place gives its colour.
        axis: along which they are aligned.
        panels: those of which at least one run has values.
        num_columns: panels in a row.
    """
    panel_height = {1: 2.6, 2: 1.9, 3: 1.75}.get(num_columns, 1.55)
    num_columns = min(num_columns, len(panels))
    num_rows = -(-len(panels) // num_columns)
    with rc_context(STYLE):
        legend = _legend_entries(runs, panels)
        legend_rows = -(-len(legend) // _legend_columns(legend)) if len(legend) > 1 else 0
        figure = Figure(figsize=(WIDTH, num_rows * panel_height + 0.16 * legend_rows + 0.1), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05, wspace=0.03, hspace=0.04)
        grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            (_draw_profile if panel.by_layer else _draw_over_time)(axes, runs, axis, panel)
            axes.set_title(panel.title)
            axes.set_ylabel(panel.unit)
        for axes in grid[len(panels) :]:
            axes.remove()
        mark_panels(grid[: len(panels)])
        if legend_rows:
            _draw_legend(figure, legend)
    return figure


def _draw_over_time(axes: Axes, runs: Sequence[Run], axis: TimeAxis, panel: Panel) -> None:
    drawn = [(place, run) for place, run in enumerate(runs) if panel.is_in(run)]
    _set_scale(axes, panel)
    for place, run in drawn:
        look = {"color": run_colour(place), "linestyle": run_dashes(place), "zorder": 3}
        if (curve := panel.training(run)) is not None:
            if panel.over_layers == "mean" and len(drawn) <= MAX_BANDS:
                _draw_band(axes, axis.of(run.training), panel.layer_values(run), run_colour(place))
            x, y = thin(axis.of(run.training), curve)
            axes.plot(x, y, marker="." if len(x) < 3 else None, **look)
            if panel.key is None:
                _mark_not_finite(axes, axis.of(run.training)[~np.isfinite(curve)], run_colour(place))
        if (curve := panel.evaluations(run)) is not None:
            x, y = thin(axis.of(run.evaluations), curve)
            look |= {"linestyle": "none", "zorder": 4, "markersize": 3.2 if len(x) <= 50 else 1.8}
            axes.plot(x, y, marker="o", markerfacecolor="white", markeredgewidth=0.8, **look)
    _finish(axes, panel)
    axes.set_xlim(0, (axis.end(runs) or 1.0) * 1.01)
    axes.set_xlabel(axis.label)
    if panel.cut_start:
        _cut_start(axes, drawn, axis, panel)


def _mark_not_finite(axes: Axes, places: np.ndarray, colour: str) -> None:
    if len(places):
        height = np.full(len(places), 0.03)
        axes.plot(places, height, "x", color=colour, markersize=4, zorder=4, transform=axes.get_xaxis_transform())


def _draw_band(axes: Axes, x: np.ndarray, layers: np.ndarray | None, colour: str) -> None:
    if layers is not None and layers.shape[1] > 1:
        low, high = over_finite(np.nanmin, layers), over_finite(np.nanmax, layers)
        x, low, high = thin(x, low, high)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)


def _draw_profile(axes: Axes, runs: Sequence[Run], axis: TimeAxis, panel: Panel) -> None:
    _set_scale(axes, panel)
    for place, run in enumerate(runs):
        if panel.is_in(run):
            layers, values = run.training.layers(panel.key), panel.layer_values(run)[-1]
            axes.plot(
                layers,
                values,
                color=run_colour(place),
                linestyle=run_dashes(place),
                marker="o",
                zorder=3,
                markersize=3 if len(layers) <= 24 else 2,
                linewidth=0.9,
            )
    _finish(axes, panel)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _set_scale(axes: Axes, panel: Panel) -> None:
    if panel.scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    elif panel.scale == "symlog":
        axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=LINEAR_BELOW, subs=(1, 2, 5)))
    if panel.scale != "linear":
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if panel.whole:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _finish(axes: Axes, panel: Panel) -> None:
    """Draw the reference line and widen the y axis to the panel's limits."""
    if panel.reference is not None:
        axes.axhline(panel.reference, color="#777777", linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
    if panel.scale != "linear":
        return
    low, high = axes.get_ylim()
    least, most = panel.limits
    if least is not None:
        # Room above a flat line too, which has no margin of its own.
        low, high = least, max(high, least + 1.08 * (axes.dataLim.y1 - least))
    if most is not None:
        high = max(high, most)
    axes.set_ylim(low, high)
    if high >= 10_000:
        axes.yaxis.set_major_formatter("{x:,.0f}")


def _cut_start(axes: Axes, drawn: list[tuple[int, Run]], axis: TimeAxis, panel: Panel) -> None:
    """Let the y axis begin with what comes after the start of the longest run."""
    start = SKIPPED_START * axis.end([run for _, run in drawn])
    seen = []
    for _, run in drawn:
        for table, curve in ((run.training, panel.training(run)), (run.evaluations, panel.evaluations(run))):
            if curve is not None:
                x, y = thin(axis.of(table), curve)
                seen.append(y[x >= start])
    values = np.concatenate(seen) if seen else np.empty(0)
    values = values[np.isfinite(values)]
    if values.size > 1 and values.min() < values.max():
        margin = 0.06 * (values.max() - values.min())
        axes.set_ylim(values.min() - margin, values.max() + margin)


def _legend_entries(runs: Sequence[Run], panels: Sequence[Panel]) -> list[tuple[str, Line2D]]:
    shown = [place for place, run in enumerate(runs) if any(panel.is_in(run) for panel in panels)]
    names = short_names(runs, width=36)
    return [
        (names[place], Line2D([], [], color=run_colour(place), linestyle=run_dashes(place), linewidth=1.6))
        for place in shown
    ]


def _legend_columns(entries: list[tuple[str, Line2D]]) -> int:
    longest = max((len(name) for name, _ in entries), default=1)
    return max(1, min(len(entries), 4, 112 // (longest + 7)))


def _draw_legend(figure: Figure, entries: list[tuple[str, Line2D]]) -> None:
    legend = figure.legend(
        [line for _, line in entries],
        [f"run {place}" for place in range(len(entries))],
        loc="outside upper left",
        ncols=_legend_columns(entries),
        borderaxespad=0.2,
        handlelength=2.2,
        columnspacing=1.6,
        labelspacing=0.25,
    )
    # Set afterwards: Matplotlib leaves out what begins with an underscore.
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        write_plainly(text)
        text.set_text(name)
