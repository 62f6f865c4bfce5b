"""The report as a folder: one HTML page that needs nothing else, and each of its figures as a PNG file."""

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context

from .. import __version__
from ..checkpoint.folders import new_folder
from ..errors import ConfigError
from .figures import ReportFigure, make_figures
from .runs import Run
from .style import STYLE, run_colour, run_dashes, time_axis
from .summary import summarize
from .svg import inline_svg

PAGE_NAME = "report.html"
_GENERATOR = "moe-hf report"
_FIGURE_NAME = re.compile(r"figure-\d+-[a-z-]+\.png")
_PNG_RESOLUTION = 200  # dots per inch: twice a screen's

_TABLE_CAPTION = (
    "The runs at their last log entry. Losses are cross-entropies in nats per token. MaxVio (largest over mean load of "
    "the experts, minus 1) and load entropy (of the experts’ shares, 1 when uniform) are means over the sparse layers, "
    "dead experts their sum; tokens per second is the median over all entries."
)


def write_report(runs: Sequence[Run], output: Path) -> Path:
    """Write a report on these runs.

    Args:
        runs: in the order in which they are shown.
        output: a folder that is new, empty, or holds a report and nothing else: that is replaced.

    Returns:
        The path of the page.

    Raises:
        ConfigError: `output` holds something else.
    """
    check_output(output)
    figures = make_figures(runs)
    with new_folder(output, replace=output.exists()) as folder:
        with rc_context(STYLE):
            for number, figure in enumerate(figures, start=1):
                figure.figure.savefig(folder / f"figure-{number}-{figure.name}.png", dpi=_PNG_RESOLUTION)
                figure.figure.set_layout_engine("none")  # it has its layout now, also for the page
        (folder / PAGE_NAME).write_text(render_page(runs, figures), encoding="utf-8")
    return output / PAGE_NAME


def check_output(output: Path) -> None:
    """Raise `ConfigError` where a report in this folder would take the place of anything but a report."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigError(f"--output {output} is a file; give a new folder.")
    names = {path.name for path in output.iterdir()}
    foreign = sorted(name for name in names if name != PAGE_NAME and not _FIGURE_NAME.fullmatch(name))
    if foreign or (names and not _is_report(output / PAGE_NAME)):
        what = f"{foreign[0]!r}" if foreign else f"a {PAGE_NAME} that is not one of ours"
        raise ConfigError(f"--output {output} holds {what}; give a new folder, or one that holds only a report.")


def _is_report(page: Path) -> bool:
    try:
        return f'<meta name="generator" content="{_GENERATOR}">' in page.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def render_page(runs: Sequence[Run], figures: Sequence[ReportFigure]) -> str:
    """Return the page. Every name and note of a run is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        title=f"Training report: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}",
        introduction=_introduction(runs),
        generator=_GENERATOR,
        version=__version__,
        table_caption=_TABLE_CAPTION,
        columns=summarize(runs),
        runs=[
            {"name": run.name, "colour": run_colour(place), "dashes": _dashes(place)} for place, run in enumerate(runs)
        ],
        notes=[(run.name, note) for run in runs for note in run.notes],
        figures=[
            {
                "title": figure.title,
                "caption": figure.caption,
                "svg": Markup(inline_svg(figure.figure, f"figure-{number}", figure.alt)),
            }
            for number, figure in enumerate(figures, start=1)
        ],
    )


def _introduction(runs: Sequence[Run]) -> str:
    by_tokens = time_axis(runs).key == "num_tokens"
    if len(runs) == 1:
        return f"Everything is drawn against the {'tokens' if by_tokens else 'optimizer steps'} of the run."
    if by_tokens:
        aligned = "by the unmasked tokens that they have seen"
    else:
        aligned = "by optimizer steps, because not all have logged their tokens"
    return f"The runs are aligned {aligned}. A run has the same colour everywhere."


def _dashes(place: int) -> str:
    """Return the lengths of strokes and gaps for SVG, empty for a solid line."""
    dashes = run_dashes(place)
    return "" if dashes == "solid" else " ".join(str(length * 2.4) for length in dashes[1])
