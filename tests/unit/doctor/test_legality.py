"""What run_clm_moe.py would refuse on so many processes is told, in its own words, without starting any."""

import os

import pytest

from moe_hf.doctor.findings import ADVICE, OK, WRONG
from moe_hf.doctor.legality import check_run, launched

ZERO3_EP = "ds_configs/zero3_ep.json"


@pytest.fixture
def words(tmp_path) -> list[str]:
    flags = {"config_name": "quickstart", "deepspeed": ZERO3_EP, "output_dir": tmp_path / "out", "do_train": True}
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def test_a_run_that_fits(words):
    run, findings = check_run([*words, "--bf16", "--expert_parallel_size", "8"], 16, 8)
    assert [finding.status for finding in findings] == [OK]
    assert findings[0].found == "16 processes, ZeRO 3, EP 8, bfloat16"
    assert run.config.num_experts == 8 and run.topology.world_size == 16


@pytest.mark.parametrize(
    ("num_ranks", "flags", "sentence"),
    [
        (3, [], "world_size=3 is no multiple of expert_parallel_size=2; use 1"),
        (16, ["--expert_parallel_size", "3"], "num_experts=8 cannot be split over expert_parallel_size=3"),
        (2, ["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0 must be at least 1."),
        (2, ["--train_file", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_is_refused_is_told_in_its_own_words(words, num_ranks, flags, sentence):
    run, (finding,) = check_run([*words, *flags], num_ranks, 8)
    assert run is None and finding.status == WRONG and sentence in finding.found


def test_an_output_folder_of_an_earlier_run(words, tmp_path):
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    assert "already holds checkpoint-3" in check_run(words, 2, 8)[1][0].found


def test_tokens_that_travel_between_machines_are_advice(words):
    _, findings = check_run([*words, "--expert_parallel_size", "8"], 8, 4)
    assert [finding.status for finding in findings] == [OK, ADVICE]
    assert "tokens travel between machines" in findings[1].found


def test_nothing_of_the_pretence_is_left(words, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with launched(16, 8):
        assert (os.environ["WORLD_SIZE"], os.environ["LOCAL_SIZE"], os.environ["RANK"]) == ("16", "8", "0")
    check_run(words, 3, 8)
    assert dict(os.environ) == before
