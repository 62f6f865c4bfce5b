"""Flash attention: when it is chosen, what it needs, and how it is told where documents begin.

Its kernels work in 16 bits on GPUs since Ampere (Dao 2023, arXiv 2307.08691) and are a package of their own; everywhere
else `torch.nn.functional.scaled_dot_product_attention` (SDPA) computes the same.
"""

import torch
import torch.nn.functional as F
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_kernels_available

from ..configuration_moe import MoEConfig
from ..errors import ConfigError

_MAX_HEAD_DIM = 256
_AMPERE, _HOPPER = 8, 9
_IS_INSTALLED = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}


def choose_attention(asked: str | None, config: MoEConfig, in_16_bits: bool) -> str:
    """Return the implementation of attention to train with.

    Args:
        asked: what `--attn_implementation` says; it is taken where it can work.
        config: of the model.
        in_16_bits: whether the model computes in bfloat16 or float16.

    Returns:
        `asked`, or else the newest flash attention that is installed and fits GPU, precision and heads, or `"sdpa"`.

    Raises:
        ConfigError: flash attention was asked for and cannot work.
    """
    if asked in _IS_INSTALLED:
        _require(asked, in_16_bits)
    if asked is not None:
        return asked
    if not (in_16_bits and torch.cuda.is_available() and config.head_dim % 8 == 0 and config.head_dim <= _MAX_HEAD_DIM):
        return "sdpa"
    generation = torch.cuda.get_device_capability()[0]
    # The third knows no dropout.
    if generation == _HOPPER and config.attention_dropout == 0.0 and is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if generation >= _AMPERE and is_flash_attn_2_available() else "sdpa"


def _require(asked: str, in_16_bits: bool) -> None:
    flag = f"--attn_implementation {asked}"
    if not torch.cuda.is_available():
        raise ConfigError(f"{flag} needs a GPU and torch sees none; use sdpa.")
    if not in_16_bits:
        raise ConfigError(f"{flag} computes in 16 bits only; add --bf16 or --fp16, or use sdpa.")
    # With the package `kernels` Transformers fetches them from the hub.
    if not _IS_INSTALLED[asked]() and not is_kernels_available():
        if asked == "flash_attention_2":
            raise ConfigError(f"{flag} needs flash-attn: pip install 'moe_hf[flash-attn]', or use sdpa.")
        raise ConfigError(f"{flag} needs flash-attn-3, which is not installed; use flash_attention_2 or sdpa.")


def document_bounds(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | int]:
    """Return the arguments that tell flash attention which tokens of packed rows belong together.

    From `position_ids` alone Transformers finds documents only in a batch of one row; in several, attention would
    cross them without a word.

    Args:
        batch: `input_ids`, and `position_ids` `(batch_size, sequence_length)` where rows are packed by document.

    Returns:
        `cu_seq_lens_q` and `cu_seq_lens_k`, int32, where each document begins in the rows laid end to end, and where
        the last one ends; `max_length_q` and `max_length_k`, the longest. Empty for rows that are padded or hold one
        document each.
    """
    positions = batch.get("position_ids")
    if positions is None or batch.get("attention_mask") is not None:
        return {}
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff(dim=-1) != 1
    starts = begins.flatten().nonzero().squeeze(-1)
    bounds = F.pad(starts, (0, 1), value=positions.numel()).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
