"""How many processes the self-test takes where, and whose fault it is when they do not come to their end."""

from types import SimpleNamespace

import pytest

from moe_hf.doctor import self_test
from moe_hf.doctor.findings import OK, SKIPPED, WRONG, Finding
from moe_hf.doctor.launching import Ended
from moe_hf.doctor.layout import Layout
from moe_hf.doctor.self_test import choose_ranks
from moe_hf.doctor.verdict import AREA, EXPORT, NORM, PARITY, RESUMING, STEPS
from moe_hf.errors import ConfigError


def run_on(num_ranks: int, ep_size: int):
    config = {"zero_optimization": {"stage": 3}, "expert_parallel": {"enabled": True, "autoep_size": ep_size}}
    return SimpleNamespace(deepspeed_json=config, topology=SimpleNamespace(world_size=num_ranks))


@pytest.mark.parametrize(
    ("run", "here", "cores", "asked", "ranks", "on_cpu", "as_the_run"),
    [
        (run_on(8, 4), 8, 64, None, 8, False, True),
        (run_on(16, 8), 8, 64, None, 4, False, False),
        (run_on(16, 8), 0, 64, None, 4, True, False),  # a login node
        (run_on(16, 8), 0, 2, None, 2, True, False),
        (run_on(16, 8), 0, 2, 16, 16, True, True),  # all of them on its cores, because the user says so
        (run_on(16, 8), 1, 16, None, 4, True, False),  # two ranks cannot share a GPU
        (run_on(16, 8), 8, 16, 16, 16, True, False),
        (run_on(2, 2), 0, 2, None, 2, True, True),
        (run_on(1, 1), 1, 16, None, 1, False, True),
    ],
)
def test_how_many_processes_on_what(run, here, cores, asked, ranks, on_cpu, as_the_run, monkeypatch):
    monkeypatch.setattr(self_test, "num_accelerators", lambda: here)
    monkeypatch.setattr(self_test, "num_cores", lambda: cores)
    found = choose_ranks(run, asked)
    assert found[:2] == (ranks, on_cpu) and (found[2] == "") == as_the_run


def test_more_than_the_run_has_are_refused():
    with pytest.raises(ConfigError, match="--self_test_ranks 4 is more than the run has; use at most 2"):
        choose_ranks(run_on(2, 2), 4)


TRIAL = SimpleNamespace(describe=lambda: "2 processes")
FOUND = {name: Finding(AREA, name, OK, "") for name in (PARITY, NORM, STEPS, EXPORT, RESUMING)}


@pytest.mark.parametrize(
    ("phase", "reached", "blamed"),
    [
        ("joining the others", [], "processes"),
        ("exchanging tensors", [], "processes"),
        ("train: building the engine", [], "processes"),
        ("train: step 1", [], STEPS),
        ("exact: step 3", [], STEPS),
        ("train: exporting", [], EXPORT),
        ("train: gathering the weights", [], EXPORT),
        ("resume: building the engine", [PARITY, NORM, STEPS, EXPORT], RESUMING),
        ("resume: step 3", [PARITY, NORM, STEPS, EXPORT], RESUMING),
        ("resume: exporting", [PARITY, NORM, STEPS, EXPORT], RESUMING),
    ],
)
def test_the_check_that_was_not_passed_is_wrong_and_those_behind_it_are_skipped(phase, reached, blamed):
    ended = Ended(1, 7.0, phase, "rank 1: it broke", [])
    findings = self_test._complete({name: FOUND[name] for name in reached}, ended, TRIAL)
    statuses = {finding.name: finding.status for finding in findings}
    assert [name for name, status in statuses.items() if status == WRONG] == [blamed]
    assert all(statuses[name] == OK for name in reached)
    skipped = [name for name in FOUND if name not in (*reached, blamed)]
    assert all(statuses[name] == SKIPPED for name in skipped)
    assert next(f for f in findings if f.name == blamed).found.endswith("rank 1: it broke")


def test_all_is_well_only_when_the_processes_end_well():
    findings = self_test._complete(dict(FOUND), Ended(0, 20.4, "leaving", "", []), TRIAL)
    assert [f.status for f in findings] == [OK] * 6 and findings[0].found == "2 processes; 20 s"


def test_an_exchange_that_damages_data_is_wrong():
    measured = {"seconds": 0.01, "bytes": 16_000_000, "gigabytes_per_second": 1.6}
    exchange = {"all_reduce": {**measured, "right": True}, "all_to_all": {**measured, "right": False}}
    right, wrong = self_test._measured(SimpleNamespace(exchange=exchange))
    assert (right.status, right.found) == (OK, "16 MB in 10.0 ms, 1.60 GB/s")
    assert wrong.status == WRONG and wrong.name == "all-to-all"
    assert self_test._measured(SimpleNamespace(exchange=None)) == []


def test_a_layout_that_cannot_be_made_small_is_told(monkeypatch, tmp_path):
    def refuse(argv):
        raise ConfigError("pipeline.stages=2 does not work with 2 ranks.")

    trial = SimpleNamespace(layout=Layout(2), describe=lambda: "2 processes")
    monkeypatch.setattr(self_test, "trial_of", lambda run, ranks: trial)
    monkeypatch.setattr(self_test, "write_plan", lambda trial, folder: folder / "plan.json")
    monkeypatch.setattr(self_test, "command_line", lambda *args: [])
    monkeypatch.setattr(self_test, "check_command_line", refuse)
    (finding,), numbers = self_test.run_self_test(
        run_on(8, 2), 2, on_cpu=True, folder=tmp_path / "work", patience=1.0, say=lambda text: None
    )
    assert finding.status == WRONG and "does not work with 2 ranks" in finding.found and numbers is None
    assert "--self_test_ranks" in finding.remedy
