"""SonicMoE in place of our experts kernel: when it is chosen, and what it needs.

Its kernels are written for Hopper GPUs (Guo et al. 2025, arXiv 2512.14080); Transformers fetches and calls them.
"""

import torch
from transformers.integrations.sonicmoe import is_sonicmoe_loadable, load_sonicmoe_kernel
from transformers.utils import logging

from ..errors import ConfigError

SONICMOE = "sonicmoe"

_HOPPER = 9

logger = logging.get_logger(__name__)


def choose_experts(asked: str | None, *, in_bfloat16: bool, in_autoep: bool) -> str | None:
    """Return the implementation of the experts to train with; `None` for our own kernel.

    Args:
        asked: what `--experts_implementation` says; it is taken where it can work.
        in_bfloat16: whether the model computes in bfloat16.
        in_autoep: whether DeepSpeed replaces the sparse blocks, whose experts then always run in our own kernel.

    Returns:
        `asked`, or else `"sonicmoe"` on a Hopper GPU where all that it needs is installed and it can be loaded.

    Raises:
        ConfigError: SonicMoE was asked for and cannot work.
    """
    if asked == SONICMOE:
        _require(in_bfloat16)
    if asked is not None or in_autoep or not in_bfloat16 or not is_sonicmoe_loadable():
        return asked
    if torch.cuda.get_device_capability()[0] != _HOPPER:
        return None
    try:
        load_sonicmoe_kernel()
    except Exception as error:  # it is fetched from the hub and compiled, and nobody has asked for it
        logger.warning(f"SonicMoE cannot be loaded, so our own kernel computes the experts: {error}")
        return None
    return SONICMOE


def _require(in_bfloat16: bool) -> None:
    flag = f"--experts_implementation {SONICMOE}"
    if not in_bfloat16:
        raise ConfigError(f"{flag} computes in bfloat16 only; add --bf16, or leave the flag away.")
    try:
        load_sonicmoe_kernel()
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"{flag} cannot be loaded here ({reason}); pip install 'moe_hf[sonicmoe]' on a machine with a Hopper GPU "
            "or newer, or leave the flag away."
        ) from error
