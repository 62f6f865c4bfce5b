"""The figures of a report: what is drawn of which runs, with captions that say how it is computed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from .catalogue import DETAILS, LOSSES, CurveFigure
from .curves import MAX_BANDS, draw_curves
from .heat_maps import MAX_LAYERS, draw_load_by_layer, draw_load_over_time, heat_map, slice_times
from .panels import MAX_POINTS, Panel
from .runs import Run
from .style import TimeAxis, short_names, time_axis

__all__ = ["ReportFigure", "heat_map", "make_figures"]


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the report.

    Attributes:
        name: of its file, without number and ending.
        title: the caption's first words.
        caption: HTML that says what is shown and how it is computed.
        alt: what the figure shows, in words.
        figure: the drawing.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure


def make_figures(runs: Sequence[Run]) -> list[ReportFigure]:
    """Draw every figure for which at least one run has logged something, in the order of the report."""
    axis = time_axis(runs)
    figures = [figure for spec in LOSSES for figure in _curves(spec, runs, axis)]
    figures += _load_figures(runs, axis)
    return figures + [figure for spec in DETAILS for figure in _curves(spec, runs, axis)]


def _curves(spec: CurveFigure, runs: Sequence[Run], axis: TimeAxis) -> Iterator[ReportFigure]:
    panels = [panel for panel in spec.panels if any(panel.is_in(run) for run in runs)]
    if not panels:
        return
    caption = " ".join(filter(None, (spec.caption, *(panel.meaning for panel in panels), *_on_details(panels, runs))))
    figure = draw_curves(runs, axis, panels, spec.num_columns)
    yield ReportFigure(spec.name, spec.title, Markup(caption), _curves_alt(spec, panels, runs, axis), figure)


def _on_details(panels: Sequence[Panel], runs: Sequence[Run]) -> Iterator[str]:
    """Yield what the caption adds about bands and averaged entries, where there are any."""
    in_time = [panel for panel in panels if not panel.by_layer]
    for panel in in_time:
        drawn = [run for run in runs if panel.is_in(run)]
        if panel.over_layers == "mean" and len(drawn) <= MAX_BANDS:
            layers = [values for run in drawn if (values := panel.layer_values(run)) is not None]
            if any(values.shape[1] > 1 for values in layers):
                yield "Shaded: from the smallest to the largest value of a layer."
                break
    if in_time and any(len(run.training) > MAX_POINTS for run in runs):
        yield f"Where there are more than {MAX_POINTS} log entries, points are means of consecutive ones."


def _curves_alt(spec: CurveFigure, panels: Sequence[Panel], runs: Sequence[Run], axis: TimeAxis) -> str:
    """Say which curves there are and where they end."""
    sentences = [f"Line charts. {spec.title.rstrip('.,')}."]
    for panel in panels:
        ends = [
            f"{name} {panel.last(run):.3g}"
            for name, run in zip(short_names(runs, 40), runs, strict=True)
            if panel.is_in(run) and not panel.by_layer
        ]
        where = "by layer" if panel.by_layer else f"against {axis.label}"
        sentences.append(f"{panel.title or panel.unit} {where}{'; last values: ' if ends else ''}{', '.join(ends)}.")
    return " ".join(sentences)


def _load_figures(runs: Sequence[Run], axis: TimeAxis) -> Iterator[ReportFigure]:
    sparse = [run for run in runs if run.training.loads and np.isfinite(axis.of(run.training)).any()]
    if not sparse:
        return
    scale = (
        " Colour: an expert’s assignments since the last log entry, divided by the mean over the experts of its layer; "
        "the scale is logarithmic, ends at ¼ and 4, and is the same for all panels. Black is an expert without a token."
    )
    deep = [run for run in sparse if len(run.training.loads) > MAX_LAYERS]
    selection = f" Of more than {MAX_LAYERS} sparse layers a selection is shown." if deep else ""
    yield ReportFigure(
        "load-over-time",
        "Load of the experts along training,",
        Markup("a row for each expert, by layer." + selection + scale),
        _loads_alt("Heat maps of the load of each expert (vertical) along training (horizontal), by layer.", sparse),
        draw_load_over_time(sparse, axis),
    )
    if deep:
        moments = len(slice_times(deep, axis))
        yield ReportFigure(
            "load-by-layer",
            "Load of the experts in all layers,",
            Markup(f"in the log entries at {moments} moments, which are the same for all runs." + scale),
            _loads_alt(
                "Heat maps of the load of each expert (horizontal) in each layer (vertical) at moments of training.",
                deep,
            ),
            draw_load_by_layer(deep, axis),
        )


def _loads_alt(what: str, runs: Sequence[Run]) -> str:
    ends = []
    for name, run in zip(short_names(runs, 40), runs, strict=True):
        last = {layer: loads[-1] for layer, loads in run.training.loads.items() if np.isfinite(loads[-1]).all()}
        ratios = {layer: float(load.max() / load.mean()) for layer, load in last.items() if load.mean() > 0}
        if ratios:
            layer = max(ratios, key=ratios.get)
            ends.append(f"{name}: {ratios[layer]:.2f} times the mean, in layer {layer}")
    return f"{what} Largest load in the last entry: {'; '.join(ends)}." if ends else what
