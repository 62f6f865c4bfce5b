"""The table, its marks, and the last word."""

import io
import sys

import pytest

from moe_hf.doctor.findings import ADVICE, OK, SKIPPED, WRONG, Finding, Report, table, verdict

FINDINGS = [
    Finding("space", "cache", OK, "1 GB free"),
    Finding("run", "placement", ADVICE, "across machines", "use 8"),
    Finding("space", "output", WRONG, "full", "another disk"),
    Finding("self-test", "not tried", SKIPPED, "refused"),
]


def test_areas_stand_together_in_the_order_they_came_and_remedies_below():
    assert list(table(FINDINGS)) == [
        "space",
        "  ✓ cache      1 GB free",
        "  ✗ output     full",
        "               -> another disk",
        "",
        "run",
        "  ! placement  across machines",
        "               -> use 8",
        "",
        "self-test",
        "  – not tried  refused",
    ]


def test_a_terminal_that_has_no_ticks_gets_words(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    lines = list(table(FINDINGS))
    assert lines[1].startswith("  ok cache") and lines[2].startswith("  NO output")
    assert all(line.isascii() for line in lines)


@pytest.mark.parametrize(("status", "is_well"), [(OK, True), (ADVICE, True), (SKIPPED, True), (WRONG, False)])
def test_only_what_is_wrong_is_not_well(status, is_well):
    report = Report([Finding("run", "thing", status, "x")])
    assert report.is_well == is_well == report.as_json()["well"]
    assert (verdict(report.findings) == "All is well.") == is_well
    assert is_well or verdict(report.findings) == "Not well: run: thing."
