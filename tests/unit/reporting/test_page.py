"""The report as a folder: what is in it, and what it may replace."""

import pytest
from metrics_files import MadeUpRun, write_entries, write_run

from moe_hf.errors import ConfigError
from moe_hf.reporting.figures import make_figures
from moe_hf.reporting.page import render_page, write_report
from moe_hf.reporting.runs import read_runs


def names(runs) -> list[str]:
    return [figure.name for figure in make_figures(runs)]


def test_figures_are_those_that_runs_have_logged(tmp_path):
    kinds = {
        "dense": MadeUpRun("dense", num_entries=3),
        "old": MadeUpRun(old=True, num_entries=3),
        "sparse": MadeUpRun(num_entries=3, sparse_layers=(3,)),
    }
    dense, old, sparse = (read_runs([write_run(tmp_path / name, kind)]) for name, kind in kinds.items())
    common = ["gradients", "attention-sink", "throughput"]
    assert names(dense) == ["loss", *common]
    assert names(old) == ["loss", "router-losses", "gradients", "throughput"]
    assert names(sparse) == ["loss", "router-losses", "load-over-time", "balance", "router-state", *common]


def test_captions_tell_of_what_is_shown_only(tmp_path):
    kinds = {"plain": MadeUpRun(num_entries=3), "limited": MadeUpRun(num_entries=3, capacity=1.0)}
    for name, kind in kinds.items():
        runs = read_runs([write_run(tmp_path / name, kind)])
        caption = next(figure.caption for figure in make_figures(runs) if figure.name == "router-state")
        assert ("exceeded the capacity" in caption) == (name == "limited")


def test_the_same_runs_give_the_same_page_and_names_stay_text(tmp_path):
    run = write_entries(tmp_path / "<b>x&y<script>", [{"step": n, "loss": 1 / n, "num_tokens": n} for n in range(1, 9)])
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"torn')
    runs = read_runs([run])
    pages = [render_page(runs, make_figures(runs)) for _ in range(2)]
    assert pages[0] == pages[1]
    assert "<b>x" not in pages[0] and "<script>" not in pages[0] and "&lt;b&gt;x&amp;y&lt;script&gt;" in pages[0]
    assert "The last line of metrics.jsonl is torn" in pages[0]


def test_a_report_replaces_a_report_and_nothing_else(tmp_path):
    runs = read_runs([write_entries(tmp_path / "run", [{"step": 1, "loss": 1.0, "grad_norm": 1.0}])])
    output = tmp_path / "report"
    page = write_report(runs, output)
    assert page == output / "report.html"
    files = ["figure-1-loss.png", "figure-2-gradients.png", "report.html"]
    assert sorted(path.name for path in output.iterdir()) == files
    (output / "figure-9-old.png").touch()
    write_report(runs, output)
    assert sorted(path.name for path in output.iterdir()) == files

    (output / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"holds 'notes\.txt'; give a new folder"):
        write_report(runs, output)
    (output / "notes.txt").unlink()
    page.write_text("<html>mine</html>")
    with pytest.raises(ConfigError, match="is not one of ours"):
        write_report(runs, output)
    assert page.read_text() == "<html>mine</html>"
    with pytest.raises(ConfigError, match=r"report\.html is a file"):
        write_report(runs, page)
    with pytest.raises(ConfigError, match=r"run holds 'metrics\.jsonl'"):
        write_report(runs, tmp_path / "run")
