"""Start run_clm_moe.py many times over several processes, for the price of importing everything once.

`run_all` starts this file as a script. It imports the package and then forks, for every command line, one child for
each rank, which goes on as run_clm_moe.py does. Towards its children it behaves as the deepspeed launcher does: it
gives them their rank in environment variables, and when one ends with an error it terminates the others.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

from launching import environment, free_port

# Most of a run is waiting, for peers and for the relay's pauses, so a few share the cores well.
_RUNS_AT_ONCE = 4
_POLL_SECONDS = 0.02
# The launcher looks at its children once a second. This is longer, so that a busy machine does not decide whether a
# rank is terminated before it has met the same error.
_GRACE_SECONDS = 5.0
_LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class Patch:
    """Something of the package that is different in the children; `rank` `None` means in all of them."""

    name: str
    """Such as `moe_hf.parallel.failure._PATIENCE_SECONDS`."""
    value: float | None = None
    raises: str | None = None
    """Makes the function called `name` raise `DataError` with this sentence."""
    rank: int | None = None


@dataclass(frozen=True)
class Run:
    """One launch of run_clm_moe.py."""

    name: str
    argv: list[str]
    folder: str
    """Working directory."""
    ranks: int = 2
    nodes: int = 1
    """Pretended machines, which the ranks fill one after the other."""
    patches: list[Patch] = field(default_factory=list)


@dataclass(frozen=True)
class Ended:
    """What a run has left; each list has one entry for each rank."""

    exit_codes: list[int]
    """Negative for the number of a signal."""
    stdout: list[str]
    stderr: list[str]
    seconds: float


def run_all(runs: list[Run], folder: Path) -> dict[str, Ended]:
    """Do all runs, a few at a time.

    Args:
        runs: with different names.
        folder: an empty folder for logs and for the Hugging Face cache.

    Returns:
        How each ended, by its name.
    """
    requests, results = folder / "runs.json", folder / "ended.json"
    requests.write_text(json.dumps([asdict(run) for run in runs]))
    server = subprocess.run(
        [sys.executable, __file__, requests, results],
        env=environment() | {"HF_HOME": str(folder / "hf_home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert server.returncode == 0, f"the fork server ended with {server.returncode}\n{server.stderr[-6000:]}"
    return {name: Ended(**ended) for name, ended in json.loads(results.read_text()).items()}


def _serve(requests: Path, results: Path) -> None:
    # What the children would otherwise import and load again and again.
    import_module("moe_hf.training.launch")
    import_module("moe_hf.training.run")
    import_module("deepspeed.comm.torch").build_shm_op()
    runs = [Run(**run | {"patches": [Patch(**p) for p in run["patches"]]}) for run in json.loads(requests.read_text())]
    waiting = {run.name: _supervise(run, results.parent / f"{i}") for i, run in enumerate(runs)}
    active, ended = {}, {}
    while waiting or active:
        while waiting and len(active) < _RUNS_AT_ONCE:
            name = next(iter(waiting))
            active[name] = waiting.pop(name)
        for name, supervision in list(active.items()):
            if (end := next(supervision)) is not None:
                ended[name] = asdict(end)
                del active[name]
        time.sleep(_POLL_SECONDS)
    results.write_text(json.dumps(ended))


def _supervise(run: Run, logs: Path) -> Iterator[Ended | None]:
    """Start the ranks of one run and yield None until all have ended."""
    logs.mkdir()
    port, start = free_port(), time.monotonic()
    children = {_fork(lambda rank=rank: _be_rank(run, rank, port, logs)): rank for rank in range(run.ranks)}
    codes, terminate_at = {}, None
    while len(codes) < run.ranks:
        for pid, rank in children.items():
            if rank not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(status[1])
        now = time.monotonic()
        if any(codes.values()) and terminate_at is None:
            terminate_at = now + _GRACE_SECONDS
        for pid in [pid for pid, rank in children.items() if rank not in codes]:
            if now > start + _LIMIT_SECONDS:
                os.kill(pid, signal.SIGKILL)
            elif terminate_at is not None and (now > terminate_at or _handles_termination(pid)):
                os.kill(pid, signal.SIGTERM)
        yield None
    # DeepSpeed leaves the buffers of its CPU collectives there for ever.
    for path in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):
        path.unlink()
    texts = {name: [(logs / f"{name}{rank}").read_text() for rank in range(run.ranks)] for name in ("out", "err")}
    yield Ended([codes[rank] for rank in range(run.ranks)], texts["out"], texts["err"], time.monotonic() - start)


def _fork(child: Callable[[], int]) -> int:
    """Fork and return the child's process id; the child ends with what `child` returns."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        code = child()
    except SystemExit as request:
        code = request.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _be_rank(run: Run, rank: int, port: int, logs: Path) -> int:
    """Do what run_clm_moe.py does, where and as which rank the launcher would start it."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(logs / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(run.folder)
    local_size = run.ranks // run.nodes
    numbers = {"RANK": rank, "LOCAL_RANK": rank % local_size, "WORLD_SIZE": run.ranks, "LOCAL_SIZE": local_size}
    numbers |= {"MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    for patch in run.patches:
        if patch.rank in (None, rank):
            _apply(patch)
    from moe_hf.training.launch import run as launch
    from moe_hf.training.run import train_and_export

    launch(train_and_export, [f"--local_rank={rank % local_size}", *run.argv])
    return 0


def _apply(patch: Patch) -> None:
    from moe_hf.errors import DataError

    def fail(*args, **kwargs):
        raise DataError(patch.raises)

    module, _, attribute = patch.name.rpartition(".")
    setattr(import_module(module), attribute, patch.value if patch.raises is None else fail)


def _handles_termination(pid: int) -> bool:
    """Whether a process has said what to do on SIGTERM; such a rank needs no more time to meet the error."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    caught = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in caught)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]))
