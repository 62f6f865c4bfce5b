"""What of a run rests in host memory or on NVMe instead of on its device, and which wishes DeepSpeed does not grant.

ZeRO-Offload (Ren et al. 2021, https://arxiv.org/abs/2101.06840) keeps optimizer states, and updates them, in host
memory; ZeRO-Infinity (Rajbhandari et al. 2021, https://arxiv.org/abs/2104.07857) rests them, and weights, on NVMe.
"""

import copy

from ..errors import ConfigError
from .deepspeed_config import Config, get_section, lookup, mistake, zero_stage

PARTS = ("offload_optimizer", "offload_param")
# Vectors of each group that must be in memory at a step of AdamW: weights, gradient, two moments.
_VECTORS_OF_ADAMW = 4


def offload_device(config: Config, part: str) -> str:
    """Return where `offload_optimizer` or `offload_param` rests: `"none"`, `"cpu"` or `"nvme"`."""
    return lookup(config, f"zero_optimization.{part}.device", "none")


def nvme_sections(config: Config | None) -> dict[str, Config]:
    """Return the sections of a DeepSpeed JSON, by name, that rest something on NVMe."""
    zero = get_section(config or {}, "zero_optimization")
    return {part: zero[part] for part in PARTS if offload_device(config or {}, part) == "nvme"}


def with_nvme_path(config: Config, path: str | None) -> Config:
    """Return a copy of a DeepSpeed JSON that rests on another disk; `None` leaves what the file says.

    Raises:
        ConfigError: nothing in the JSON goes to NVMe.
    """
    if path is None:
        return config
    config = copy.deepcopy(config)
    if not nvme_sections(config):
        raise ConfigError(
            f'--nvme_path {path} has no effect, because nothing in the DeepSpeed JSON has "device": "nvme"; use '
            "ds_configs/zero3_nvme.json."
        )
    for section in nvme_sections(config).values():
        section["nvme_path"] = path
    return config


def check_offload(config: Config) -> None:
    """Refuse offloading that DeepSpeed would ignore, do elsewhere, or break at the first step or checkpoint.

    Args:
        config: the DeepSpeed JSON, whose keys and values DeepSpeed knows.

    Raises:
        ConfigError: with the first mistake found.
    """
    _check_stage(config)
    _check_variants(config)
    for part, section in nvme_sections(config).items():
        if not section.get("nvme_path"):
            raise ConfigError(
                f"zero_optimization.{part}.nvme_path is missing; give a folder on a local disk: --nvme_path /PATH"
            )
    if "offload_optimizer" in nvme_sections(config):
        _check_optimizer_buffers(parsed_zero(config).offload_optimizer)
    if "offload_param" in nvme_sections(config) and parsed_zero(config).max_reuse_distance:
        raise ConfigError(
            'zero_optimization.offload_param.device="nvme" reads weights into few buffers, where none can wait for its '
            'next use; add "stage3_max_reuse_distance": 0 to zero_optimization'
        )


def parsed_zero(config: Config):
    """Return the section `zero_optimization` as DeepSpeed reads it, with its defaults."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig(**config["zero_optimization"])


def _check_stage(config: Config) -> None:
    stage = zero_stage(config)
    for part, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = offload_device(config, part)
        if device != "none" and stage < lowest:
            stages = "stage 3" if lowest == 3 else "stage 1, 2 or 3"
            wanted = f"has no effect at ZeRO stage {stage}; use {stages} or delete {part}"
            raise mistake(f"zero_optimization.{part}.device", device, wanted)
    if stage < 3 and offload_device(config, "offload_optimizer") == "nvme":
        wanted = f'would rest in host memory at ZeRO stage {stage}; use stage 3, or "cpu"'
        raise mistake("zero_optimization.offload_optimizer.device", "nvme", wanted)
    if "offload_param" in nvme_sections(config) and "offload_optimizer" not in nvme_sections(config):
        wanted = 'without offload_optimizer.device="nvme" cannot be resumed; write "nvme" for both, or "cpu"'
        raise mistake("zero_optimization.offload_param.device", "nvme", wanted)


def _check_variants(config: Config) -> None:
    """Refuse what looks like offloading but trains otherwise, or was never run."""
    if lookup(config, "zero_optimization.zenflow", None) is not None:
        raise ConfigError(
            "zero_optimization.zenflow updates most weights later, by older gradients, so that a run is no longer the "
            'one without it; delete it and keep "offload_optimizer"'
        )
    ratio = lookup(config, "zero_optimization.offload_optimizer.ratio", 1.0)
    if ratio != 1.0:
        wanted = "keeps the rest in an optimizer that no checkpoint holds; write 1.0 or delete it"
        raise mistake("zero_optimization.offload_optimizer.ratio", ratio, wanted)
    if lookup(config, "zero_optimization.offload_optimizer.super_offload", False):
        wanted = "is for CPU and GPU on one chip, and was never run here; delete it"
        raise mistake("zero_optimization.offload_optimizer.super_offload", True, wanted)
    if lookup(config, "aio.use_gds", False):
        raise mistake("aio.use_gds", True, "moves data between NVMe and GPU, and was never run here; delete it")


def _check_optimizer_buffers(section) -> None:
    """The vectors of a group lie in buffers while it is updated, with pipelines those of its neighbours beside them."""
    num_groups = 1 + section.pipeline_read + section.pipeline_write
    needed = _VECTORS_OF_ADAMW * num_groups
    if section.buffer_count < needed:
        groups = f"{num_groups} groups" if num_groups > 1 else "a group"
        wanted = f"is too few for weights, gradient and two moments of {groups}; write {needed}"
        raise mistake("zero_optimization.offload_optimizer.buffer_count", section.buffer_count, wanted)
