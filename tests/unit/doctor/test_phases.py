"""Where processes are can be told from outside, also when they hang."""

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_hf.doctor import phases
from moe_hf.doctor.phases import Phase, PhaseLog, describe_stall, read_phases

HANGING = """
import sys, time
from pathlib import Path
from phases import PhaseLog

def wait_for_ever():
    time.sleep(600)

log = PhaseLog(Path(sys.argv[1]), 1)
log.begin("train: step 1")
log.begin("train: step 2")
wait_for_ever()
"""


@pytest.fixture(autouse=True)
def no_handler_is_left():
    """Which would write to a file that is closed."""
    yield
    faulthandler.unregister(signal.SIGUSR2)


def test_phases_are_read_by_rank(tmp_path):
    for rank in (1, 0):
        log = PhaseLog(tmp_path, rank)
        log.begin("joining")
        log.begin(f"rank {rank} works")
    assert read_phases(tmp_path) == {rank: Phase(rank, 2, f"rank {rank} works", os.getpid()) for rank in (0, 1)}


def test_who_is_behind_and_where(tmp_path):
    folder, script = tmp_path / "phases", tmp_path / "hanging_worker.py"
    script.write_text(HANGING)
    log = PhaseLog(folder, 0)
    for name in ("a", "b", "train: step 3"):
        log.begin(name)
    # The module by itself: importing the package takes seconds.
    environment = {"PYTHONPATH": str(Path(phases.__file__).parent)}
    with subprocess.Popen([sys.executable, script, folder], env=environment) as process:
        while read_phases(folder).get(1, Phase(1, 0, "", 0)).number < 2:
            time.sleep(0.1)
        try:
            stall = describe_stall(folder, 2)
        finally:
            process.kill()
    behind, waiting = stall.split("; ")
    assert behind.startswith("rank 1 in 'train: step 2' (at wait_for_ever, ") and behind.endswith(":7) is behind")
    assert waiting.startswith("rank 0 in 'train: step 3'")
    assert describe_stall(folder, 4) == "ranks 2, 3 did not get as far as importing moe_hf"
