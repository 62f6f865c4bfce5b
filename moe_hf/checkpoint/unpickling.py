"""Read what `torch.save` wrote without running code out of the file.

DeepSpeed puts a few records of its own classes beside the tensors. They are read into the inert stand-ins below, by
name, so that neither DeepSpeed nor anything that a file names is imported or called.
"""

import pickle
import re
from pathlib import Path

import torch

from ..errors import CheckpointError


class Address:
    """Where a parameter's fragment lies in a flat partition, in elements."""

    numel: int
    start: int


class _Ignored:
    """A record that nobody here reads."""


_STAND_INS = [
    (Address, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


def load(path: Path) -> dict:
    """Return the content of a file of `torch.save`, its tensors mapped from the disk until they are touched.

    Raises:
        CheckpointError: the file is damaged, or holds objects other than tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        unknown = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds an object of {unknown[1]}, which is not loaded" if unknown else "is damaged"
        raise CheckpointError(f"{path} {what}; give a checkpoint that run_clm_moe.py wrote.") from None
    except Exception as error:  # damage, or a pickle made by hand, can make the reader raise anything
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path} is damaged ({reason}); use another checkpoint.") from None
