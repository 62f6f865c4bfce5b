"""`moe-hf report` writes a page, and tells a mistake in one sentence."""

import pytest
from metrics_files import write_entries

from moe_hf import cli

ENTRIES = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_a_page_is_written_where_asked(tmp_path, capsys):
    paths = [write_entries(tmp_path / name, ENTRIES) for name in ("a", "b")]
    cli.main(["report", *map(str, paths), "--output", str(tmp_path / "out")])
    page = tmp_path / "out" / "report.html"
    table = ["| Run | Steps | Training loss |", "| --- | ----: | ------------: |", "| a   |     2 |        1.0000 |"]
    assert capsys.readouterr().out.splitlines() == [*table, table[-1].replace("a", "b"), "", str(page)]
    assert "Training report: 2 runs" in page.read_text()


def test_the_folder_is_called_report_by_default(tmp_path, monkeypatch):
    write_entries(tmp_path / "run", ENTRIES)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        cli.main(["report", "run"])
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.parametrize("words", [["nowhere"], ["empty"], ["run", "run"], ["run", "--output", "run"]])
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, capsys, words):
    write_entries(tmp_path / "run", ENTRIES)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["report", *words])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "report").exists()
