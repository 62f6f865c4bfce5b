"""What the doctor says: findings, one line each, and the table that they end in."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

# What was looked at and is right; works, but could be better; is wrong; was not looked at, with the reason.
OK, ADVICE, WRONG, SKIPPED = "ok", "advice", "wrong", "skipped"

_MARKS = {OK: "✓", ADVICE: "!", WRONG: "✗", SKIPPED: "–"}
_PLAIN_MARKS = {OK: "ok", ADVICE: "!", WRONG: "NO", SKIPPED: "-"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        area: the section of the table: `"versions"`, `"compiler"`, …
        name: what was looked at, in few words.
        status: `"ok"`, `"advice"`, `"wrong"` or `"skipped"`.
        found: what there is.
        remedy: what to change; empty where nothing is to be changed.
    """

    area: str
    name: str
    status: str
    found: str
    remedy: str = ""


@dataclass
class Report:
    """All findings of one examination, and the numbers of its self-test."""

    findings: list[Finding] = field(default_factory=list)
    self_test: dict | None = None

    @property
    def is_well(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.status != WRONG for finding in self.findings)

    def as_json(self) -> dict:
        """Return plain values, as `moe-hf doctor --json` documents them."""
        return {
            "well": self.is_well,
            "findings": [asdict(finding) for finding in self.findings],
            "self_test": self.self_test,
        }


def table(findings: Iterable[Finding]) -> Iterator[str]:
    """Yield the lines of the table: a mark, what was looked at, what there is; below it what to change."""
    findings = list(findings)
    areas = list(dict.fromkeys(finding.area for finding in findings))
    findings.sort(key=lambda finding: areas.index(finding.area))
    marks = _MARKS if _can_print("".join(_MARKS.values())) else _PLAIN_MARKS
    names, width = max(len(f.name) for f in findings), max(map(len, marks.values()))
    area = None
    for finding in findings:
        if finding.area != area:
            yield from ([] if area is None else [""])
            yield finding.area
            area = finding.area
        yield f"  {marks[finding.status]:<{width}} {finding.name:<{names}}  {finding.found}".rstrip()
        if finding.remedy:
            yield f"  {'':<{width}} {'':<{names}}  -> {finding.remedy}"


def verdict(findings: Iterable[Finding]) -> str:
    """Return the last line: whether all is well, or how much is wrong."""
    wrong = [finding for finding in findings if finding.status == WRONG]
    if not wrong:
        return "All is well."
    return f"Not well: {', '.join(f'{finding.area}: {finding.name}' for finding in wrong)}."


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
