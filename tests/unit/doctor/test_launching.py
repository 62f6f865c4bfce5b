"""How a launch has ended is told in one sentence: the rank that knows most speaks."""

import json

from moe_hf.doctor.launching import _progress, _what_went_wrong
from moe_hf.doctor.phases import Phase


def note(folder, rank: int, kind: str, message: str, phase: str = "train: step 1") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{rank}.json").write_text(json.dumps({"rank": rank, "phase": phase, "type": kind, "message": message}))


def test_the_error_is_that_of_the_rank_which_met_it(tmp_path):
    note(tmp_path, 0, "RuntimeError", "Connection closed by peer", "train: step 2")
    note(tmp_path, 1, "CheckpointError", "no such tensor", "train: exporting")
    sentence, phase = _what_went_wrong(tmp_path, 1, "", "leaving")
    assert sentence == "rank 1 in 'train: exporting': CheckpointError: no such tensor" and phase == "train: exporting"


def test_a_stall_says_more_than_what_the_ends_of_processes_say(tmp_path):
    note(tmp_path, 0, "RuntimeError", "Connection closed by peer")
    sentence, phase = _what_went_wrong(tmp_path, -15, "rank 1 is behind", "resume: step 3")
    assert sentence == "nothing moved any more: rank 1 is behind" and phase == "resume: step 3"


def test_processes_that_left_no_word(tmp_path):
    sentence, _ = _what_went_wrong(tmp_path / "none", -9, "", "train: step 1")
    assert sentence == "the processes ended with exit code -9 in 'train: step 1'"
    assert _what_went_wrong(tmp_path / "none", 0, "", "leaving") == ("", "leaving")


def test_progress_is_that_of_the_slowest():
    phases = {0: Phase(0, 4, "train: step 2", 1), 1: Phase(1, 3, "train: step 1", 2)}
    assert _progress(phases, 2) == "train: step 1"
    assert _progress(phases, 3) == "starting 3 processes"
