"""How everything that is drawn looks: colours, fonts, names of runs, and the axis along which runs are aligned."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from .runs import Run, Table

# Okabe and Ito's palette, which all common kinds of colour blindness tell apart, with grey for its yellow, which
# vanishes on white. Neighbours differ in lightness too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
# Every eighth run has the colour of the first again, and other dashes.
DASHES = ("solid", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1, 1.5)))

# Inches: the text width of A4 with margins of 15 mm, so that the fonts are printed at their sizes.
WIDTH = 7.1

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.labelsize": 7.5,
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "moe_hf",  # the same figure gives the same file
}


@dataclass(frozen=True)
class TimeAxis:
    """What runs are aligned by: tokens seen, or steps where a run does not tell its tokens."""

    key: str
    label: str
    unit: float

    def of(self, table: Table) -> np.ndarray:
        """Return where each entry lies, of shape (T,)."""
        column = table.column(self.key)
        return np.full(len(table), np.nan) if column is None else column / self.unit

    def end(self, runs: Sequence[Run]) -> float:
        """Return the largest value of any training entry, 0 where there is none."""
        return max((_largest(self.of(run.training)) for run in runs), default=0.0)


def time_axis(runs: Sequence[Run]) -> TimeAxis:
    """Choose the axis that all runs have, in the unit that gives short numbers."""
    tables = [table for run in runs for table in (run.training, run.evaluations) if len(table)]
    tokens = [table.column("num_tokens") for table in tables]
    if all(column is not None and np.isfinite(column).all() for column in tokens):
        key, label, least = "num_tokens", "tokens seen", 1e3
        largest = max(_largest(column) for column in tokens)
    else:
        key, label, least = "step", "step", 1e6
        largest = max(_largest(table.column("step")) for table in tables)
    for unit, name in ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= unit >= least:
            return TimeAxis(key, f"{label} ({name})", unit)
    return TimeAxis(key, label, 1.0)


def _largest(values: np.ndarray | None) -> float:
    return 0.0 if values is None or not np.isfinite(values).any() else float(np.nanmax(values))


def run_colour(index: int) -> str:
    """Return the colour of the run at this place."""
    return COLOURS[index % len(COLOURS)]


def run_dashes(index: int):
    """Return the line style of the run at this place, as Matplotlib takes it."""
    return DASHES[index // len(COLOURS) % len(DASHES)]


def short_names(runs: Sequence[Run], width: int) -> list[str]:
    """Return each run's name with its middle left out where it is longer than `width`; no two are the same."""
    names = [shorten(run.name, width) for run in runs]
    if len(set(names)) < len(names):
        names = [f"{place}: {shorten(run.name, width - 4)}" for place, run in enumerate(runs, start=1)]
    return names


def shorten(text: str, width: int) -> str:
    """Leave out the middle of a text that is longer than `width`: both ends of a run's name tell most."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def write_plainly(text) -> None:
    """Show dollar signs in a Matplotlib text as they are, instead of reading mathematics between them."""
    text.set_parse_math(False)


def wrapped(text: str, width: int) -> str:
    """Break a text into lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(text, width, break_long_words=True))


def mark_panels(panels: Sequence[Axes]) -> None:
    """Put (a), (b), … before the titles, for captions to refer to; one panel alone has none."""
    if len(panels) > 1:
        for place, axes in enumerate(panels):
            axes.set_title(f"({chr(ord('a') + place)}) {axes.get_title(loc='left')}")
