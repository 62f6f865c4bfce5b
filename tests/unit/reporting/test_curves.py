"""What is drawn of the curves."""

import numpy as np
from matplotlib.colors import to_hex
from metrics_files import MadeUpRun, write_entries, write_run

from moe_hf.reporting.catalogue import DETAILS, LOSSES
from moe_hf.reporting.curves import draw_curves
from moe_hf.reporting.panels import Panel
from moe_hf.reporting.runs import read_runs
from moe_hf.reporting.style import COLOURS, time_axis

LOSS = LOSSES[0].panels


def lines_of(axes) -> dict[tuple[str, str], np.ndarray]:
    """Return the points of every line by its colour and marker."""
    return {(to_hex(line.get_color()).upper(), line.get_marker()): line.get_xydata() for line in axes.lines}


def test_a_run_has_its_colour_where_others_are_missing(tmp_path):
    kinds = {"dense": MadeUpRun("dense", num_entries=20), "sparse": MadeUpRun(num_entries=20)}
    runs = read_runs([write_run(tmp_path / name, kind) for name, kind in kinds.items()])
    axis = time_axis(runs)
    balance = next(figure for figure in DETAILS if figure.name == "balance")
    figure = draw_curves(runs, axis, balance.panels, balance.num_columns)
    max_vio = lines_of(figure.axes[0])
    assert max_vio.keys() == {(COLOURS[1], "None"), (COLOURS[1], "o")}
    of_layers = runs[1].training.by_layer("max_vio")
    tokens = runs[1].training.column("num_tokens") / axis.unit
    np.testing.assert_allclose(max_vio[COLOURS[1], "None"], np.stack([tokens, of_layers.mean(axis=1)], axis=1))
    band = figure.axes[0].collections[0].get_datalim(figure.axes[0].transData)
    assert (band.y0, band.y1) == (of_layers.min(), of_layers.max())
    assert figure.legends == []  # one run alone
    losses = draw_curves(runs, axis, LOSS, 1)
    assert [text.get_text() for text in losses.legends[0].get_texts()] == ["dense", "sparse"]


def test_losses_that_are_not_finite_are_marked(tmp_path):
    values = [3.0, None, 2.0, float("nan"), 1.5]
    entries = [{"step": step, "num_tokens": step * 10, "loss": loss} for step, loss in enumerate(values, start=1)]
    runs = read_runs([write_entries(tmp_path / "run", entries)])
    crosses = lines_of(draw_curves(runs, time_axis(runs), LOSS, 1).axes[0])[COLOURS[0], "x"]
    assert crosses[:, 0].tolist() == [20, 40]


def test_the_first_losses_do_not_flatten_the_others(tmp_path):
    entries = [{"step": n, "num_tokens": n, "loss": 100.0 if n < 5 else 2 + 1 / n} for n in range(1, 101)]
    runs = read_runs([write_entries(tmp_path / "run", entries)])
    low, high = draw_curves(runs, time_axis(runs), LOSS, 1).axes[0].get_ylim()
    assert 1.9 < low < 2.01 and 2.2 < high < 2.3


def test_names_are_shown_as_they_are(tmp_path):
    names = ["_hidden", "$x^2$ & <b>"]
    runs = read_runs([write_entries(tmp_path / name, [{"step": 1, "loss": 1.0}]) for name in names])
    texts = draw_curves(runs, time_axis(runs), LOSS, 1).legends[0].get_texts()
    assert [text.get_text() for text in texts] == names
    assert not any(text.get_parse_math() for text in texts)


def test_letters_tell_panels_apart(tmp_path):
    runs = read_runs([write_run(tmp_path / "run", MadeUpRun(num_entries=3))])
    panels = [Panel("loss", "loss"), Panel("norm", "grad_norm", scale="log")]
    figure = draw_curves(runs, time_axis(runs), panels, 2)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["(a) loss", "(b) norm"]
    assert figure.axes[1].get_yscale() == "log"
