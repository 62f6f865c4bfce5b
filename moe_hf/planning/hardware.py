"""What named GPUs can do, by their makers' data sheets."""

import re
from dataclasses import dataclass

from ..errors import ConfigError

# Dense BF16 matmul peaks in TFLOP/s, without sparsity: from the data sheets of NVIDIA (H100, H200, A100, L40S, B200),
# the architecture paper of Ada (RTX 4090, float32 accumulation) and the data sheet of AMD (MI300X). The first pattern
# that fits counts. Devices cut into slices (MIG) have no peak of their own.
_PEAK_TFLOPS = {
    r"\bMIG\b": None,
    r"\bH100 PCIe\b": 756.0,
    r"\bH[12]00 NVL\b": 835.0,
    r"\bH[12]00\b": 989.0,
    r"\bA100\b": 312.0,
    r"\bL40S\b": 362.0,
    r"\bRTX 4090$": 165.0,
    r"\bMI300X\b": 1307.0,
    r"\bB200\b": 2250.0,
}


def peak_tflops_of(device_name: str) -> float | None:
    """Return the dense BF16 peak of a GPU in TFLOP/s, by its name in CUDA or ROCm; `None` for an unknown one."""
    return next((peak for pattern, peak in _PEAK_TFLOPS.items() if re.search(pattern, device_name)), None)


@dataclass(frozen=True)
class Hardware:
    """One GPU and its links. Bandwidths are in GB/s (10⁹ bytes), of links in one direction.

    Args:
        name: of the GPU.
        memory: in GB.
        peak_tflops: dense, BF16.
        hbm: of its memory.
        nvlink: to the other GPUs of its machine, together.
        network: to other machines.
        host_link: to host memory.
        host_memory: of host memory, this GPU's share of its machine's.
    """

    name: str
    memory: float
    peak_tflops: float
    hbm: float
    nvlink: float
    network: float
    host_link: float
    host_memory: float


# NVIDIA's data sheets: H100 and H200 Tensor Core GPU (SXM: NVLink 900 GB/s in both directions, PCIe 5 x16), A100 Tensor
# Core GPU (SXM: 600 GB/s, PCIe 4 x16). Networks and host memory are those of DGX machines: DGX H100 and H200, one
# ConnectX-7 of 400 Gb/s and an eighth of 16 channels of DDR5-4800 for each GPU; DGX A100, 200 Gb/s and an eighth of 16
# channels of DDR4-3200.
_TABLE = (
    Hardware("H100-80GB", 80, 989.0, 3350, 450, 50, 64, 76.8),
    Hardware("H200", 141, 989.0, 4800, 450, 50, 64, 76.8),
    Hardware("A100-80GB", 80, 312.0, 2039, 300, 25, 32, 51.2),
    Hardware("A100-40GB", 40, 312.0, 1555, 300, 25, 32, 51.2),
)

HARDWARE = {hardware.name: hardware for hardware in _TABLE}
"""The GPUs there are figures of, by name."""


def hardware_called(name: str) -> Hardware:
    """Return the figures of a GPU.

    Raises:
        ConfigError: there are none of that name.
    """
    if name not in HARDWARE:
        raise ConfigError(f"--hardware {name} is not known; there are {', '.join(HARDWARE)}")
    return HARDWARE[name]
