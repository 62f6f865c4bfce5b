"""Start programs the way users do: through the deepspeed launcher, over several processes, on gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "tests" / "distributed" / "worker.py"


def environment(on_cpu: bool = True) -> dict[str, str]:
    """Return an environment in which several ranks share two cores, and nobody looks for a network."""
    without_accelerator = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if on_cpu else {}
    return {
        **os.environ,
        **without_accelerator,
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # As after activating the environment: its ninja, not another, whose notes on what is compiled would differ.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
    }


def hear_ctrl_c() -> None:
    """Let a process that is being started end on SIGINT; one started in the background inherits that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deepspeed(
    num_ranks: int, *words: str | Path, timeout: int = 600, cwd: Path = ROOT, on_cpu: bool = True
) -> subprocess.CompletedProcess:
    """Run `deepspeed --num_accelerators NUM_RANKS …` to its end and return what it printed."""
    # What the `deepspeed` command consists of, also where its script is not beside the interpreter.
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        num_ranks,
        "--master_port",
        port,
        *words,
    ]
    try:
        return subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env=environment(on_cpu),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    finally:
        # What DeepSpeed leaves in shared memory when its processes are ended from outside.
        for path in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):
            path.unlink(missing_ok=True)


def run_cases(
    num_ranks: int,
    cases: list[dict],
    folder: Path,
    timeout: int = 900,
    worker: Path = WORKER,
    module: str | None = None,
) -> None:
    """Run many command lines of run_clm_moe.py in one launch; each leaves its results in `folder/NAME`.

    The worker is a script, or a module if one is given.

    Raises:
        AssertionError: the launch itself ended with an error, whose last output is shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"cases_{num_ranks}.json"
    path.write_text(json.dumps(cases))
    program = [worker] if module is None else ["--module", module]
    done = deepspeed(num_ranks, *program, path, folder, timeout=timeout)
    printed = f"{done.stdout[-3000:]}{done.stderr[-6000:]}"
    assert done.returncode == 0, f"{num_ranks} ranks ended with {done.returncode}\n{printed}"


def run_script(script: str, *words: str | Path, timeout: int = 1800, **variables: str) -> subprocess.CompletedProcess:
    """Run a launch script to its end, without accelerators."""
    with subprocess.Popen(
        ["bash", f"scripts/{script}", *map(str, words)],
        cwd=ROOT,
        env={**environment(), "LAUNCH_PYTHON": sys.executable, "MASTER_PORT": str(free_port()), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
