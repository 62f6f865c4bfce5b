"""A signal is remembered until the end of the step, on all ranks, and workers that read data do not die of it."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from moe_hf.training import preemption
from moe_hf.training.preemption import SignalWatch, spare_workers

CPU = torch.device("cpu")


@pytest.fixture
def watch():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    watch = SignalWatch()
    yield watch
    watch.stop()
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_is_remembered(watch, number):
    watch.start()
    watch.start()
    assert watch.agreed(CPU) is None
    os.kill(os.getpid(), number)
    assert watch.agreed(CPU) is number
    assert watch.agreed(CPU) is number


def test_signals_do_what_they_did_when_it_is_over(watch):
    received = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        watch.start()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not received
        watch.stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_only_the_main_thread_may_watch(watch):
    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=watch.start)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_signal_of_another_rank_counts(watch, monkeypatch):
    def reduce(tensor, op):
        assert op == dist.ReduceOp.MAX
        tensor.fill_(max(int(tensor), signal.SIGUSR1))

    monkeypatch.setattr(preemption, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", reduce)
    assert watch.agreed(CPU) is signal.SIGUSR1


def test_exit_code_is_no_other():
    """1: an exception. 2: a mistake of the user. Above 128: a signal."""
    assert preemption.EXIT_CODE == 75


READER = textwrap.dedent(
    """
    import sys, torch
    from torch.utils.data import DataLoader
    from moe_hf.training.preemption import spare_workers

    class Rows(torch.utils.data.Dataset):
        def __len__(self): return 4
        def __getitem__(self, index): return index

    def initialize(worker): print("initialized", worker, flush=True)

    if __name__ == "__main__":
        loader = DataLoader(Rows(), num_workers=1, prefetch_factor=1, worker_init_fn=initialize)
        if "spared" in sys.argv:
            spare_workers(loader)
        rows = iter(loader)
        print(next(rows).item(), flush=True)
        sys.stdin.readline()
        print(sum(row.item() for row in rows), flush=True)
    """
)


@pytest.mark.parametrize("spared", [True, False])
def test_workers_outlive_a_signal_to_the_whole_tree(tmp_path, spared):
    script = tmp_path / "reader.py"
    script.write_text(READER)
    words = [sys.executable, str(script)] + ["spared"] * spared
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout.readline() == "initialized 0\n"
        assert reader.stdout.readline() == "0\n"
        for child in psutil.Process(reader.pid).children(recursive=True):
            if "resource_tracker" not in " ".join(child.cmdline()):
                child.terminate()
        out, err = reader.communicate("go on\n", timeout=60)
    # Without, it is seen that the signal does harm.
    assert (out, reader.returncode) == (("6\n", 0) if spared else ("", 1)), err


def test_loader_that_holds_another_is_spared_too():
    class Holder:
        def __init__(self, loader):
            self.base_dataloader = loader

        def __getattr__(self, name):
            return getattr(self.base_dataloader, name)

    inner = DataLoader([1])
    spare_workers(Holder(inner))
    assert inner.worker_init_fn is not None
