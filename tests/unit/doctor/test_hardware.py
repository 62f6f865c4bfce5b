"""Devices and what connects them, on machines that this one is not."""

import socket
import subprocess
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from moe_hf.doctor import hardware
from moe_hf.doctor.findings import ADVICE, OK, WRONG
from moe_hf.doctor.hardware import check_accelerator, check_interconnect

H100 = {"name": "H100", "total_memory": 80 * 2**30, "major": 9, "minor": 0}
V100 = {"name": "V100", "total_memory": 32 * 2**30, "major": 7, "minor": 0}


def by_name(findings) -> dict:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def gpus(monkeypatch):
    """Function that lets this machine have GPUs."""

    def have(*devices: dict, peers: bool = True) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(devices))
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**devices[index]))
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: peers)
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
        monkeypatch.setattr(hardware, "accelerator_name", lambda: "cuda")

    return have


def test_a_machine_without_accelerators(monkeypatch):
    monkeypatch.setattr(hardware, "has_nvidia_driver", lambda: False)
    found = by_name(check_accelerator(16, bf16=True))
    assert {finding.status for finding in found.values()} == {OK}
    assert "16 processes would share" in found["accelerator"].found and "cores" in found["CPU"].found


def test_a_torch_that_cannot_use_the_gpu_there_is(monkeypatch):
    monkeypatch.setattr(hardware, "has_nvidia_driver", lambda: True)
    finding = check_accelerator(None)[0]
    assert finding.status == WRONG and torch.__version__ in finding.found and "driver" in finding.remedy


def test_gpus_of_one_kind(gpus):
    gpus(H100, H100)
    found = by_name(check_accelerator(16, bf16=True))
    assert {finding.status for finding in found.values()} == {OK}
    assert "H100, 80 GiB, compute capability 9.0" in found["devices"].found
    assert found["number"].found == "2 here; the run's 16 are on several machines"


def test_old_or_mixed_gpus(gpus):
    gpus(H100, V100)
    found = by_name(check_accelerator(2, bf16=True))
    assert found["devices"].status == ADVICE and "H100" in found["devices"].found and "V100" in found["devices"].found
    assert found["BF16"].status == WRONG and "--fp16" in found["BF16"].remedy
    assert by_name(check_accelerator(2))["BF16"].status == OK  # not asked for


def test_deepspeed_and_torch_must_compute_on_the_same(gpus, monkeypatch):
    gpus(H100)
    monkeypatch.setattr(hardware, "accelerator_name", lambda: "cpu")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    finding = by_name(check_accelerator(1))["DeepSpeed"]
    assert finding.status == WRONG and finding.remedy == "unset DS_ACCELERATOR"


TOPOLOGY = """
        GPU0    GPU1    GPU2    CPU Affinity
GPU0     X      NV18    SYS     0-31
GPU1    NV18     X      SYS     0-31
GPU2    SYS     SYS      X      32-63

Legend:
  NV#  = Connection traversing a bonded set of # NVLinks, such as NV4
"""


def test_links_between_gpus(gpus, monkeypatch):
    gpus(H100, H100, H100)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: SimpleNamespace(stdout=TOPOLOGY))
    assert hardware.num_nvlinks() == 1
    found = by_name(check_interconnect())
    assert found["NCCL"].found == "2.27.5"
    assert found["peer to peer"].status == OK and "NVLink (1 pairs" in found["peer to peer"].found
    gpus(H100, H100, peers=False)
    finding = by_name(check_interconnect())["peer to peer"]
    assert finding.status == ADVICE and "2 of 2 directions" in finding.found and "(0, 1)" in finding.found


def test_gloo(monkeypatch):
    assert by_name(check_interconnect())["gloo"].status == OK
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    assert by_name(check_interconnect())["gloo"].status == WRONG


def test_a_host_name_that_stands_for_nothing(monkeypatch):
    def fail(name: str) -> str:
        raise OSError("Name or service not known")

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", fail)
    finding = by_name(check_interconnect())["address"]
    assert finding.status == ADVICE and "GLOO_SOCKET_IFNAME" in finding.remedy
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert by_name(check_interconnect())["address"].status == OK
