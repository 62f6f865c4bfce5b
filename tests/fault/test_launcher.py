"""The same through the deepspeed launcher: a signal to all that it has started, and kill -9 of its ranks."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from fault_server import Blow, draw_blow
from launching import ROOT, environment, free_port

from moe_hf.checkpoint.manifest import checkpoints_of, is_whole

_LIMIT_SECONDS = 120


@contextmanager
def launched(words: list[str]) -> Iterator[subprocess.Popen]:
    """Start the launcher in a session of its own; end whatever is left of it."""
    port = free_port()
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(port)]
    with subprocess.Popen(
        [*command, str(ROOT / "run_clm_moe.py"), *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            for path in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):
                path.unlink(missing_ok=True)


def ranks(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """Return the processes that train, by their rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # what the launcher calls in passing
            for word in child.cmdline():
                if word.startswith("--local_rank="):
                    found[int(word.removeprefix("--local_rank="))] = child
    return found


def await_moment(process: subprocess.Popen, blow: Blow, output_dir: Path) -> dict[int, psutil.Process]:
    """Return the ranks when all are there and the moment has come."""
    until, found = time.monotonic() + _LIMIT_SECONDS, {}
    while len(found) < 2 or not blow.is_due(output_dir):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.004)
        found = found if len(found) == 2 else ranks(process)
    time.sleep(blow.delay)
    return found


def test_signal_to_everything_leaves_a_checkpoint(lab):
    """As a scheduler sends it: to the ranks, to their launcher, which sends it again, and to what started that."""
    folder = lab.folder / "everything"
    with launched(lab.words("everything", 2, max_steps=500, save_strategy="no")) as process:
        await_moment(process, Blow("log", step=2), folder)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert out.count("SIGTERM: saving a checkpoint.") == 1
    assert err.count("Go on with --resume_from_checkpoint auto.") == 1 and "Traceback" not in err, err
    (checkpoint,) = checkpoints_of(folder)
    assert is_whole(checkpoint, part="all")


@pytest.mark.slow
def test_killed_ranks_end_with_the_weights_of_the_uninterrupted_run(lab):
    """Twenty times in a row."""
    draw = random.Random(11)
    for zero in (2, 3):
        with launched(lab.words(f"uninterrupted_{zero}", zero)) as process:
            _, err = process.communicate(timeout=_LIMIT_SECONDS)
        assert process.returncode == 0, err
    for i in range(20):
        name, zero, blow = f"launched_{i}", 2 + i % 2, draw_blow(draw, i)
        with launched(lab.words(name, zero)) as process:
            for rank, child in await_moment(process, blow, lab.folder / name).items():
                if rank in blow.ranks:
                    child.kill()
            process.communicate(timeout=_LIMIT_SECONDS)
        assert process.returncode != 0, name
        with launched(lab.words(name, zero)) as process:
            _, err = process.communicate(timeout=_LIMIT_SECONDS)
        assert process.returncode == 0, err
        lab.assert_same_weights(name, f"uninterrupted_{zero}")
        lab.assert_tidy(name)
