"""The command line, the table and the file of results."""

import json
import os
import sys

import pytest

from benchmarks.machine import describe_machine, environment_of, versions
from benchmarks.peers.registry import OURS
from benchmarks.report import markdown_table
from benchmarks.results import FAILED, UNAVAILABLE, Row, as_json
from benchmarks.run import SUITES, build_parser, main
from benchmarks.suites import run_suites
from benchmarks.timing import Ratio
from benchmarks.watching import Busy, LoadWatch
from moe_hf.errors import ConfigError

ROWS = [
    Row("layer", "e8", "ours", "fp32", "skewed", values={"forward_backward_ms": 10.0, "tokens_per_second": 30.0}),
    Row(
        "layer",
        "e8",
        "peer",
        "fp32",
        "skewed",
        values={"forward_backward_ms": 20.0, "tokens_per_second": 10.0, "operators": 68, "max_error": 5e-7},
        ratios={"forward_backward_ms": Ratio(2.1, 1.9, 2.4, 12)},
    ),
    Row("layer", "e8", "gone", "fp32", "skewed", UNAVAILABLE, "it is | not installed"),
    Row("layer", "e64", "peer", "fp32", "skewed", FAILED, "RuntimeError: no\nkernel"),
    Row("memory", "ZeRO 2: weights", "formula", values={"bytes": 105, "formula_bytes": 100, "over_formula": 1.05}),
]


def test_json_has_a_row_for_each_metric():
    found = list(as_json(ROWS))
    by = {(row["config"], row["peer_name"], row["metric"]): row for row in found}
    time = by["e8", "peer", "forward_backward_ms"]
    assert (time["ours"], time["peer"], time["ratio"]) == (10.0, 20.0, 2.1)
    assert (time["lower"], time["upper"], time["rounds"]) == (1.9, 2.4, 12)
    assert by["e8", "peer", "tokens_per_second"]["ratio"] == 3.0  # ours over the peer: more is better
    assert by["e8", "peer", "max_error"]["ratio"] is None
    assert by["e8", "peer", "operators"]["ours"] is None
    assert by["e8", "gone", None]["status"] == UNAVAILABLE and by["e8", "gone", None]["ratio"] is None
    assert by["ZeRO 2: weights", "formula", "bytes"]["ratio"] == 1.05
    keys = {"suite", "config", "dtype", "metric", "ours", "peer", "peer_name", "ratio"}
    assert all(keys <= set(row) for row in found)
    assert json.loads(json.dumps(found)) == found


def test_table_shows_what_there_is():
    lines = markdown_table(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS) and len({line.replace("\\|", "").count("|") for line in lines}) == 1
    titles = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert "step ms" not in titles and "slope of time" not in titles
    peer = dict(zip(titles, (cell.strip() for cell in lines[3].strip("|").split("|")), strict=True))
    assert peer["forward + backward ms"] == "20.00" and peer["ours is"] == "2.10× [1.90, 2.40]"
    assert peer["operators"] == "68" and peer["largest relative error"] == "5.0e-07"
    assert "unavailable: it is \\| not installed" in lines[4] and "failed: RuntimeError: no kernel" in lines[5]


def test_names_on_the_command_line():
    arguments = build_parser().parse_args(["--suite", "all", "--peers", "auto", "--config", "e8,e64"])
    assert arguments.suite == SUITES and arguments.peers is None and arguments.config == ["e8", "e64"]


@pytest.mark.parametrize("words", [["--suite", "lair"], ["--rounds", "0"], ["--peers", ","], ["--device", "tpu"]])
def test_wrong_words_are_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args(words)
    assert end.value.code == 2 and words[0] in capsys.readouterr().err


def test_environment_is_told():
    machine = describe_machine("cpu")
    assert machine["environment"] == environment_of("cpu") and machine["environment"]["OMP_NUM_THREADS"] == "1"
    assert machine["threads"] == 1 and machine["cores"] >= 1
    assert {"python", "torch", "transformers", "deepspeed", "moe_hf"} <= set(versions())


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--suite", "layer", "--peers", "mixtral/eagre"], "--peers mixtral/eagre is not known in these suites"),
        (["--suite", "step", "--peers", "sonicmoe"], "--peers sonicmoe is not known in these suites"),
        (["--suite", "step", "--config", "e8"], "--config e8 is not known in these suites; there are auto, e64."),
    ],
)
def test_an_unknown_name_is_one_sentence(words, sentence):
    arguments = build_parser().parse_args(words)
    with pytest.raises(ConfigError, match=sentence.replace("/", r"\/")):
        next(run_suites(arguments, "cpu", LoadWatch(allowed=True)))


@pytest.fixture
def measure(capfd, monkeypatch, tmp_path):
    """Return a function that runs the program with given rows, and what it raises behind them; and its file."""
    # Of a process of its own: standard output is given away, signals are caught, the allocator is set.
    monkeypatch.setattr("sys.stdout", sys.stdout)
    dup2 = os.dup2
    monkeypatch.setattr("os.dup2", lambda *ends: None if ends == (2, 1) else dup2(*ends))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("benchmarks.machine.restart_with", lambda *_: None)
    output = tmp_path / "results.json"

    def run(rows: list[Row], error: BaseException | None = None) -> None:
        def suites(*_):
            yield from rows
            if error is not None:
                raise error

        monkeypatch.setattr("benchmarks.suites.run_suites", suites)
        main(["--device", "cpu", "--output", str(output)])

    return run, output


def test_ours_that_failed_is_exit_code_1(measure, capfd):
    run, output = measure
    run(ROWS)
    assert "| layer |" in capfd.readouterr().out
    with pytest.raises(SystemExit) as end:
        run([*ROWS, Row("step", "e64", OURS, status=FAILED, reason="Different: loss of step 1")])
    printed = capfd.readouterr()
    assert end.value.code == 1 and "failed: Different: loss of step 1" in printed.out
    assert "error: ours failed in step e64; the table says why.\n" in printed.err
    written = json.loads(output.read_text())
    assert written["finished"] and written["rows"][-1]["reason"] == "Different: loss of step 1"


@pytest.mark.parametrize(
    "error, ended, code",
    [
        (RuntimeError("unspecified launch failure"), RuntimeError, None),
        (Busy("Other processes use 9.0 of 2 cores."), SystemExit, 2),
        (KeyboardInterrupt(), SystemExit, 130),
    ],
)
def test_what_is_done_is_written_however_it_ends(measure, capfd, error, ended, code):
    run, output = measure
    with pytest.raises(ended) as end:
        run(ROWS, error)
    assert getattr(end.value, "code", None) == code
    assert "| layer |" in capfd.readouterr().out
    written = json.loads(output.read_text())
    assert not written["finished"] and len(written["rows"]) == len(list(as_json(ROWS)))


def test_a_mistake_leaves_earlier_results(measure):
    run, output = measure
    output.write_text("earlier")
    with pytest.raises(SystemExit):
        run([], ConfigError("--config e9 is not known in these suites."))
    assert output.read_text() == "earlier"


def test_a_mistake_ends_with_exit_code_2(monkeypatch, capsys):
    def refuse(*arguments):
        raise Busy("Other processes use 9.0 of 2 cores.")

    monkeypatch.setattr("benchmarks.run._measure", refuse)
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "error: Other processes use 9.0 of 2 cores.\n")
