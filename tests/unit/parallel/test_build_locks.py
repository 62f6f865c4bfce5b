"""Locks of killed processes are removed; those that somebody may hold are left until nobody can."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from moe_hf.parallel import build_locks
from moe_hf.parallel.build_locks import remove_stale_build_locks

HOLD = """
import sys
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(params=["operator/lock", "py311_cpu/operator/lock"])
def lock(request, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / request.param
    path.parent.mkdir(parents=True)
    return path


def test_lock_of_a_killed_process_is_removed_and_of_a_living_one_kept(lock):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        remove_stale_build_locks()
        assert lock.exists()
        holder.kill()
    assert lock.exists()
    remove_stale_build_locks()
    assert not lock.exists() and FileBaton(str(lock)).try_acquire()


def test_nothing_else_is_removed(lock):
    others = [lock.with_name("lock.cpp"), lock.with_name("operator.so"), lock.parent / "src" / "deep" / "lock"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    remove_stale_build_locks()
    assert all(path.exists() for path in others)


def test_on_a_shared_disk_a_young_lock_is_waited_for(lock, monkeypatch, capsys):
    monkeypatch.setattr(build_locks, "_is_on_network", lambda path: True)
    lock.touch()
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        age = 250.0 * len(waited)
        os.utime(lock, (time.time() - age, time.time() - age))

    monkeypatch.setattr(time, "sleep", sleep)
    remove_stale_build_locks()
    assert len(waited) == 3 and not lock.exists()
    assert capsys.readouterr().out.count(f"Waiting for another machine to release {lock}") == 1


def test_lock_that_is_released_meanwhile_is_no_error(lock, monkeypatch):
    monkeypatch.setattr(build_locks, "_is_held", lambda path: path.unlink())
    lock.touch()
    remove_stale_build_locks()
    assert not lock.exists()


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [({"/": "ext4"}, False), ({"/": "nfs4", "{}": "tmpfs"}, False), ({"/": "ext4", "{}": "nfs4"}, True)],
)
def test_the_nearest_mount_decides(tmp_path, monkeypatch, kinds, expected):
    mounts = [type("Part", (), {"mountpoint": point.format(tmp_path), "fstype": kind}) for point, kind in kinds.items()]
    monkeypatch.setattr(build_locks.psutil, "disk_partitions", lambda all: mounts)
    assert build_locks._is_on_network(tmp_path / "lock") is expected
