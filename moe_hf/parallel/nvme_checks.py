"""Look at the disk, the operator and the buffers of offloading to NVMe before any process group starts.

DeepSpeed meets what is wrong with them late and without a sentence: an assertion in the first forward pass, a compiler
error, or a disk that is full at some step.
"""

import os
import resource
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ..configuration_moe import MoEConfig
from ..errors import ConfigError
from ..modeling_moe import MoEForCausalLM, MoESparseBlock
from .deepspeed_config import Config, autoep_enabled, mistake
from .offload import nvme_sections, parsed_zero
from .placement import processes_per_machine

# DeepSpeed leaves smaller pieces of a rank in memory.
_SMALLEST_BYTES = 2**20
# Float32 weights, gradient and two moments.
_OPTIMIZER_BYTES = 16
_CAP_IPC_LOCK = 14


@dataclass(frozen=True)
class Weights:
    """How large a model's parameters are.

    Attributes:
        largest: elements of the largest one, before AutoEP divides anything.
        groups: elements of each, in the groups that ZeRO 3 fetches as one: modules, and sparse blocks.
    """

    largest: int
    groups: list[list[int]]

    @property
    def total(self) -> int:
        """Number of all elements."""
        return sum(map(sum, self.groups))

    def most_swapped_together(self, world_size: int, element_bytes: int) -> int:
        """Return how many parameters of one group are on NVMe, of which each needs a buffer while it is fetched."""
        smallest = _SMALLEST_BYTES // element_bytes * world_size
        return max(sum(numel >= smallest for numel in group) for group in self.groups)


def check_nvme(config: Config, model_config: MoEConfig, *, world_size: int, in_16_bits: bool) -> None:
    """Refuse offloading to NVMe that cannot work on this machine or with this model; does nothing without any.

    Args:
        config: the DeepSpeed JSON, checked by `check_offload`.
        model_config: of the model.
        world_size: number of ranks of the whole run.
        in_16_bits: whether the model computes in BF16 or FP16.

    Raises:
        ConfigError: with the first mistake found.
    """
    sections = nvme_sections(config)
    if not sections:
        return
    for section in sections.values():
        _check_folder(section["nvme_path"])
    weights = weights_of(model_config, expert_parallel=autoep_enabled(config))
    element_bytes = 2 if in_16_bits else 4
    if "offload_param" in sections:
        _check_weight_buffers(parsed_zero(config).offload_param, weights, world_size, element_bytes)
    # AutoEP makes new weights of the experts', beside whose files those of the old ones stay.
    _check_space(sections, weights, world_size, element_bytes * (1 + autoep_enabled(config)))
    _check_locked_memory(config, weights, world_size, element_bytes)
    _check_operator()


def weights_of(model_config: MoEConfig, *, expert_parallel: bool) -> Weights:
    """Return the sizes of a model's parameters without building them; AutoEP divides gate from up."""
    with torch.device("meta"):
        model = MoEForCausalLM(model_config)
    blocks = [name for name, module in model.named_modules() if isinstance(module, MoESparseBlock)]
    groups: dict[str, list[int]] = {}
    for name, param in model.named_parameters():
        group = next((block for block in blocks if name.startswith(f"{block}.")), name.rpartition(".")[0])
        halves = 2 if expert_parallel and name.endswith(".experts.gate_up_proj") else 1
        groups.setdefault(group, []).extend([param.numel() // halves] * halves)
    return Weights(max(param.numel() for param in model.parameters()), list(groups.values()))


def _check_folder(path: str) -> None:
    if not Path(path).is_dir():
        raise ConfigError(f"--nvme_path {path} is not a folder; make it, on a local disk of every machine.")
    try:
        descriptor, probe = tempfile.mkstemp(dir=path)
    except OSError as error:
        raise ConfigError(f"--nvme_path {path} cannot be written: {error.strerror}.") from None
    os.close(descriptor)
    try:
        os.close(os.open(probe, os.O_RDWR | getattr(os, "O_DIRECT", 0)))
    except OSError:
        raise ConfigError(
            f"--nvme_path {path} is on a file system without direct I/O; give a folder on a local disk."
        ) from None
    finally:
        os.unlink(probe)


def _check_weight_buffers(section, weights: Weights, world_size: int, element_bytes: int) -> None:
    share = -(-weights.largest // world_size)
    if section.buffer_size < share:
        wanted = f"holds less than a rank's share of the largest weight, {share} elements; write {share} or more"
        raise mistake("zero_optimization.offload_param.buffer_size", section.buffer_size, wanted)
    needed = weights.most_swapped_together(world_size, element_bytes)
    if section.buffer_count < needed:
        wanted = f"is less than the weights that one block fetches together; write {needed} or more, best {2 * needed}"
        raise mistake("zero_optimization.offload_param.buffer_count", section.buffer_count, wanted)


def _check_space(sections: dict[str, Config], weights: Weights, world_size: int, weight_bytes: int) -> None:
    bytes_each = {"offload_optimizer": _OPTIMIZER_BYTES, "offload_param": weight_bytes}
    num_local = processes_per_machine() or world_size
    for path in {section["nvme_path"] for section in sections.values()}:
        here = sum(bytes_each[part] for part, section in sections.items() if section["nvme_path"] == path)
        needed, free = here * weights.total * num_local // world_size, shutil.disk_usage(path).free
        if free < needed:
            raise ConfigError(
                f"--nvme_path {path} has {free / 1e6:,.0f} MB free, but this machine's share of the run is "
                f"{needed / 1e6:,.0f} MB ({here} bytes a parameter); free some, or use more machines."
            )


def _check_locked_memory(config: Config, weights: Weights, world_size: int, element_bytes: int) -> None:
    """DeepSpeed's buffers are locked in memory, and it aborts where the system does not allow so much."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    needed = locked_bytes(config, weights, world_size, element_bytes)
    if limit != resource.RLIM_INFINITY and limit < needed and not _may_lock_all():
        raise ConfigError(
            f"Offloading to NVMe locks {needed / 1e6:.0f} MB of memory in each process, but the system allows "
            f"{limit / 1e6:.0f} MB: raise the limit (ulimit -l unlimited), or write smaller buffers into the JSON."
        )


def locked_bytes(config: Config, weights: Weights, world_size: int, element_bytes: int) -> int:
    """Return how much memory the buffers of one rank take, whatever rests on NVMe."""
    zero, sections, total = parsed_zero(config), nvme_sections(config), 0
    share = -(-weights.total // world_size)
    sub_group = min(share, zero.sub_group_size + weights.largest // world_size)
    if "offload_optimizer" in sections:
        total += zero.offload_optimizer.buffer_count * sub_group * 4
    if "offload_param" in sections:
        total += (zero.offload_param.buffer_count * zero.offload_param.buffer_size + sub_group) * element_bytes
    return total


def _may_lock_all() -> bool:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return False
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> _CAP_IPC_LOCK & 1)


def _check_operator() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            "Offloading to NVMe needs DeepSpeed's operator async_io, which is compiled against libaio, and its headers "
            "are missing; install them (apt-get install libaio-dev, or yum install libaio-devel), or rest in host "
            'memory: "device": "cpu".'
        )
