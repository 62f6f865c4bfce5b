"""Do terrible things to runs of run_clm_moe.py, many times, for the price of importing everything once.

Like `fork_server.py`, on which it builds. A `Chain` is one command line that is started again and again, as a
scheduler does, and each `Start` says what happens: files of a checkpoint are damaged before it, the disk is full, or a
process gets a signal. When, its output folder decides, so that a process can be killed in the middle of a save.
"""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

import psutil
from fork_server import Ended, Run, _be_rank, _fork
from launching import environment, free_port
from small import NUM_STEPS

_CHAINS_AT_ONCE = 2
_POLL_SECONDS = 0.004
# The launcher looks once a second whether a process has failed, and is patient with the others for half a minute. As in
# `fork_server.py`, a busy machine shall not decide whether a rank is terminated before it has met the same error.
_NOTICE_SECONDS, _PATIENCE_SECONDS, _LIMIT_SECONDS = 3.0, 30.0, 100.0


@dataclass(frozen=True)
class Blow:
    """A signal at a certain moment."""

    moment: str
    """`"start"`; `"log"`, when step `step` is logged; `"save"`, when its checkpoint is being written; or
    `"checkpoint"`, when that is in place."""
    step: int = 0
    delay: float = 0.0
    """Seconds after the moment."""
    number: int = signal.SIGKILL
    ranks: tuple[int, ...] = (0, 1)
    tree: bool = False
    """Send it to the ranks' children too, such as workers of a data loader."""

    def is_due(self, output_dir: Path) -> bool:
        """Whether the moment has come."""
        place = output_dir / f"checkpoint-{self.step}"
        if self.moment == "save":
            return (output_dir / f".{place.name}.incomplete").exists() or place.exists()
        if self.moment == "log":
            log = output_dir / "metrics.jsonl"
            return log.exists() and log.read_text().count('"loss"') >= self.step
        return self.moment == "start" or place.exists()

    def strike(self, pid: int) -> None:
        """Send the signal."""
        for child in psutil.Process(pid).children(recursive=True) if self.tree else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(self.number)
        os.kill(pid, self.number)


def draw_blow(draw: random.Random, repetition: int) -> Blow:
    """Draw who is killed and when: during a save, between two, or before there is any checkpoint."""
    ranks = [(0,), (1,), (0, 1)][repetition % 3]
    moment = ["save", "checkpoint", "save", "start"][repetition % 4]
    if moment == "start":
        return Blow(moment, delay=draw.uniform(0.0, 3.0), ranks=ranks)
    # A save takes some 0.1 s here, and a step with its save 0.2 s.
    longest = 0.1 if moment == "save" else 0.2
    return Blow(moment, step=draw.randint(1, NUM_STEPS - 1), delay=draw.uniform(0.0, longest), ranks=ranks)


@dataclass(frozen=True)
class Damage:
    """What becomes of one file."""

    file: str
    """Within the output folder."""
    how: str
    """`"remove"`, `"cut"` to half its size, or `"flip"` one bit."""

    def apply(self, output_dir: Path) -> None:
        """Do it."""
        path = output_dir / self.file
        content = bytearray(path.read_bytes())
        if self.how == "remove":
            path.unlink()
        elif self.how == "cut":
            path.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 4
            path.write_bytes(content)


@dataclass(frozen=True)
class Start:
    """One start of a chain's command line, and what happens to it."""

    blow: Blow | None = None
    damages: tuple[Damage, ...] = ()
    words: tuple[str, ...] = ()
    """More words after the command line."""
    file_limits: dict[str, int] = field(default_factory=dict)
    """Largest file in bytes that a rank may write from its second checkpoint on, by rank, as when its disk is full."""


@dataclass(frozen=True)
class Chain:
    """One command line on two ranks, started several times."""

    name: str
    argv: list[str]
    output_dir: str
    starts: list[Start] = field(default_factory=lambda: [Start()])


def run_chains(chains: list[Chain], folder: Path) -> dict[str, list[Ended]]:
    """Do all chains; return for each how it ended each time.

    Args:
        chains: with different names.
        folder: for logs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    requests, results = folder / "chains.json", folder / "ended.json"
    requests.write_text(json.dumps([asdict(chain) for chain in chains]))
    server = subprocess.run(
        [sys.executable, __file__, requests, results],
        env=environment() | {"HF_HOME": str(folder / "hf_home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert server.returncode == 0, f"the server ended with {server.returncode}\n{server.stderr[-6000:]}"
    return {name: [Ended(**each) for each in ended] for name, ended in json.loads(results.read_text()).items()}


def logged_steps(run: Ended) -> list[str]:
    """Return the steps that a start has logged, such as `2/6`."""
    return [line.split()[1] for line in run.stdout[0].splitlines() if line.startswith("step ") and "| loss" in line]


def _serve(requests: Path, results: Path) -> None:
    import_module("moe_hf.training.launch")
    import_module("moe_hf.training.run")
    import_module("deepspeed.comm.torch").build_shm_op()
    waiting = [_read_chain(record) for record in json.loads(requests.read_text())]
    active, ended = {}, {chain.name: [] for chain in waiting}
    while waiting or active:
        while waiting and len(active) < _CHAINS_AT_ONCE:
            chain = waiting.pop(0)
            active[chain.name] = _supervise_chain(chain, results.parent / chain.name)
        for name, supervision in list(active.items()):
            try:
                end = next(supervision)
            except StopIteration:
                del active[name]
                continue
            if end is not None:
                ended[name].append(asdict(end))
        time.sleep(_POLL_SECONDS)
    results.write_text(json.dumps(ended))


def _read_chain(record: dict) -> Chain:
    for start in record["starts"]:
        start["blow"] = start["blow"] and Blow(**start["blow"] | {"ranks": tuple(start["blow"]["ranks"])})
        start["damages"] = tuple(Damage(**damage) for damage in start["damages"])
    return Chain(**record | {"starts": [Start(**start) for start in record["starts"]]})


def _supervise_chain(chain: Chain, logs: Path) -> Iterator[Ended | None]:
    """Start a chain again and again; yield None while it runs, and how it has ended each time."""
    port = free_port()  # the same for all starts, as the launcher's own is
    for index, start in enumerate(chain.starts):
        for damage in start.damages:
            damage.apply(Path(chain.output_dir))
        folder = logs / str(index)
        folder.mkdir(parents=True)
        yield from _supervise(chain, start, port, folder)
    for path in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):
        path.unlink()


def _supervise(chain: Chain, start: Start, port: int, logs: Path) -> Iterator[Ended | None]:
    began, blow = time.monotonic(), start.blow
    run = Run(chain.name, [*chain.argv, *start.words], str(logs))
    children = {_fork(lambda rank=rank: _be_limited_rank(start, run, rank, port, logs)): rank for rank in (0, 1)}
    codes, strike_at, ender = {}, None, None
    while len(codes) < len(children):
        for pid, rank in children.items():
            if rank not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(status[1])
        now, alive = time.monotonic(), {pid for pid, rank in children.items() if rank not in codes}
        if blow is not None and strike_at is None and blow.is_due(Path(chain.output_dir)):
            strike_at = now + blow.delay
        if strike_at is not None and now >= strike_at:
            for pid in alive:
                if children[pid] in blow.ranks:
                    blow.strike(pid)
            blow = strike_at = None
        if ender is None and (any(codes.values()) or now > began + _LIMIT_SECONDS):
            ender = _end()
            next(ender)
        if ender is not None:
            ender.send(alive)
        yield None
    texts = {name: [(logs / f"{name}{rank}").read_text() for rank in (0, 1)] for name in ("out", "err")}
    yield Ended([codes[rank] for rank in (0, 1)], texts["out"], texts["err"], time.monotonic() - began)


def _end() -> Generator[None, set[int], None]:
    """Do what the launcher does to the other processes when one has failed; is sent those that are still alive."""
    for number, patience in ((signal.SIGTERM, _NOTICE_SECONDS), (signal.SIGKILL, _PATIENCE_SECONDS)):
        alive, until = set(), time.monotonic() + patience
        while time.monotonic() < until:
            alive = yield
        for pid in alive:
            os.kill(pid, number)
    while True:
        yield


def _be_limited_rank(start: Start, run: Run, rank: int, port: int, logs: Path) -> int:
    if (limit := start.file_limits.get(str(rank))) is not None:
        saving = import_module("moe_hf.training.saving")
        begin, begun = saving.begin, []

        def begin_limited(checkpoint: Path) -> Path:
            begun.append(checkpoint)
            staging = begin(checkpoint)
            if len(begun) == 2:
                # A file that would become larger is refused with an error, as by a full disk.
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return staging

        saving.begin = begin_limited
    return _be_rank(run, rank, port, logs)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]))
