"""Buffers of one run are removed, and those of others left alone."""

import os
from pathlib import Path

import pytest

from moe_hf.parallel.shared_memory import remove_shared_buffers


@pytest.fixture
def buffers():
    paths = [Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_test.invalid_{port}_0") for port in (1, 11)]
    for path in paths:
        path.touch()
    yield paths
    for path in paths:
        path.unlink(missing_ok=True)


def test_of_the_run_that_this_process_belongs_to(buffers, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "test.invalid")
    monkeypatch.setenv("MASTER_PORT", "1")
    remove_shared_buffers()
    assert [path.exists() for path in buffers] == [False, True]


def test_of_another_run(buffers, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    remove_shared_buffers()
    assert all(path.exists() for path in buffers)
    remove_shared_buffers("test.invalid", 11)
    assert [path.exists() for path in buffers] == [True, False]
