"""Two machines: network namespaces with a cable between them, or two launchers on loopback where none may be made.

The launch script of two machines runs on each of them without ssh, and from one of them with a hostfile, through real
ssh and pdsh. Whatever way, the losses are those of as many processes on one machine.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import ROOT, environment, free_port

from moe_hf.checkpoint.manifest import is_whole, read_manifest
from moe_hf.reporting.metrics_log import METRICS_NAME

SCRIPT = "scripts/train_mixtral_8x7b_16gpu.sh"
CABLE = "cable0"  # how each machine calls its end
# The twin with fewer layers: it is the way to start that is looked at.
FLAGS = ["--num_hidden_layers", "4", "--expert_parallel_size", "2"]
SSH_TOOLS = ("sshd", "pdsh", "ssh", "ssh-keygen")


@dataclass(frozen=True)
class Machine:
    """A machine to start commands on: a namespace, or this machine itself."""

    namespace: str | None
    address: str
    interface: str

    def start(self, command: list[str | Path], **variables: str) -> subprocess.Popen:
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        return subprocess.Popen(
            [*inside, *map(str, command)],
            cwd=ROOT,
            env={**environment(), "GLOO_SOCKET_IFNAME": self.interface, "LAUNCH_PYTHON": sys.executable, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def run_quietly(*words: str) -> bool:
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@contextmanager
def two_machines() -> Iterator[list[Machine]]:
    """Yield two machines that see each other; their namespaces end with the block."""
    names = [f"moe{os.getpid() % 100000}{letter}" for letter in "ab"]
    made = [name for name in names if shutil.which("ip") and run_quietly("ip", "netns", "add", name)]
    try:
        if len(made) == 2 and run_quietly("ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1]):
            machines = [Machine(name, f"10.213.7.{i}", CABLE) for i, name in enumerate(names, start=1)]
            for machine in machines:
                connect(machine)
            yield machines
        else:
            yield [Machine(None, "127.0.0.1", "lo")] * 2
    finally:
        for name in made:
            run_quietly("ip", "netns", "delete", name)


def connect(machine: Machine) -> None:
    """Move the machine's end of the cable into it, with an address."""
    name = machine.namespace
    for words in (
        f"link set {name} netns {name}",
        f"-n {name} link set {name} name {machine.interface}",
        f"-n {name} address add {machine.address}/24 dev {machine.interface}",
        f"-n {name} link set {machine.interface} up",
        f"-n {name} link set lo up",
    ):
        subprocess.run(["ip", *words.split()], check=True)


def finish(*processes: subprocess.Popen, timeout: int = 900) -> list[str]:
    """Wait until all have ended well; return what they have printed. Nothing is left running."""
    until, printed = time.monotonic() + timeout, []
    try:
        for process in processes:
            printed.append(process.communicate(timeout=until - time.monotonic())[0])
        assert not any(process.returncode for process in processes), "\n".join(text[-4000:] for text in printed)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    return printed


def losses(folder: Path) -> list[tuple[float, float]]:
    entries = map(json.loads, (folder / METRICS_NAME).read_text().splitlines())
    return [(entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry]


def on_one_machine(folder: Path, processes: int) -> list[tuple[float, float]]:
    """Return what as many processes on this machine log."""
    variables = {"SMOKE": "1", "NODES": "1", "GPUS_PER_NODE": str(processes), "MASTER_PORT": str(free_port())}
    here = Machine(None, "127.0.0.1", "lo")
    finish(here.start(["bash", SCRIPT, *FLAGS, "--output_dir", folder], **variables))
    return losses(folder)


def assert_same_run(folder: Path, expected: list[tuple[float, float]], processes: int) -> None:
    found = losses(folder)
    assert len(found) == 3
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-4) and norm == pytest.approx(wanted_norm, rel=1e-4)
    checkpoint = folder / "checkpoint-3"
    assert is_whole(checkpoint, part="all")
    topology = read_manifest(checkpoint).topology
    assert (topology.world_size, topology.expert_parallel_size, topology.zero_stage) == (processes, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("per_machine", [1, 2])
def test_the_script_on_each_of_two_machines(tmp_path, per_machine):
    expected = on_one_machine(tmp_path / "one", 2 * per_machine)
    with two_machines() as machines:
        variables = {"SMOKE": "1", "MASTER_ADDR": machines[0].address, "MASTER_PORT": str(free_port())}
        variables["GPUS_PER_NODE"] = str(per_machine)
        command = ["bash", SCRIPT, *FLAGS, "--output_dir", tmp_path / "two"]
        printed = finish(*(m.start(command, NODE_RANK=str(i), **variables) for i, m in enumerate(machines)))
    assert_same_run(tmp_path / "two", expected, 2 * per_machine)
    # With a process on each machine, both share one set of experts; with two on each, those of a machine do.
    warned = "".join(printed).count("tokens travel between machines to their experts")
    assert warned == (1 if per_machine == 1 else 0)


@pytest.mark.slow
def test_the_script_on_one_machine_with_a_hostfile(tmp_path):
    missing = [tool for tool in SSH_TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; apt-get install openssh-server pdsh")
    expected = on_one_machine(tmp_path / "one", 4)
    with two_machines() as machines:
        if machines[0].namespace is None:
            pytest.skip("no network namespaces here, and a hostfile names every machine once")
        (tmp_path / "hosts").write_text("".join(f"{machine.address} slots=2\n" for machine in machines))
        # What ssh does not carry to the other machine, DeepSpeed reads from this file.
        handed_on = f"DS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME={CABLE}\nHF_HUB_OFFLINE=1\nOMP_NUM_THREADS=1\n"
        (tmp_path / "environment").write_text(handed_on)
        variables = {
            "SMOKE": "1",
            "HOSTFILE": str(tmp_path / "hosts"),
            "GPUS_PER_NODE": "2",
            "MASTER_PORT": str(free_port()),
            "DS_ENV_FILE": str(tmp_path / "environment"),
            "PATH": f"{ssh_client(tmp_path)}:{os.environ['PATH']}",
        }
        command = ["bash", SCRIPT, *FLAGS, "--output_dir", tmp_path / "two"]
        with ssh_servers(machines, tmp_path):
            finish(machines[0].start(command, **variables))
    assert_same_run(tmp_path / "two", expected, 4)


def ssh_client(folder: Path) -> Path:
    """Make a key, and an `ssh` that uses it; return the folder to put before the others in PATH."""
    run = {"check": True, "capture_output": True}
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], **run)
    (folder / "authorized_keys").write_text((folder / "key.pub").read_text())
    options = f"-F none -p 2222 -i {folder / 'key'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -q"
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    wrapper.chmod(0o755)
    return wrapper.parent


@contextmanager
def ssh_servers(machines: list[Machine], folder: Path) -> Iterator[None]:
    """Let both machines be reached by ssh, with the key of `ssh_client` only."""
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = {
        "Port": 2222,
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
    }
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    servers = [machine.start([sshd, "-D", "-e", "-f", folder / "sshd_config"]) for machine in machines]
    try:
        for machine in machines:
            await_port(machines[0], machine.address)
        yield
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def await_port(machine: Machine, address: str, port: int = 2222) -> None:
    """Wait until the port at `address` takes connections from `machine`."""
    probe = f"until (exec 3<>/dev/tcp/{address}/{port}) 2>/dev/null; do sleep 0.1; done"
    finish(machine.start(["bash", "-c", probe]), timeout=20)
