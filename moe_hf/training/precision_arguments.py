"""Arguments that concern the precision of the computation, beyond those that `TrainingArguments` has."""

from dataclasses import dataclass, field

import torch
from transformers.utils import is_torch_tf32_available

from ..errors import ConfigError
from ..parallel.float8 import check_float8_supported


@dataclass
class PrecisionArguments:
    """In how many bits matrices are multiplied."""

    fp8: bool = field(
        default=False,
        metadata={
            "help": "With --bf16: multiply in 8 bits in attention, dense MLPs and shared experts (torchao; emulated "
            "without a GPU)."
        },
    )

    def check_precision_arguments(self) -> None:
        """Raise `ConfigError` with one sentence for a precision that this machine or another flag does not allow."""
        if self.tf32 and not is_torch_tf32_available():
            raise ConfigError(f"--tf32 {self.tf32} needs an NVIDIA GPU of Ampere or newer; leave it out.")
        if self.fp8:
            if not self.bf16:
                raise ConfigError("--fp8 multiplies in 8 bits what --bf16 keeps in 16; add --bf16.")
            check_float8_supported()

    def apply_tf32(self) -> None:
        """Say `--tf32` to torch in its older way too, without which compiling raises that the two ways are mixed."""
        if self.tf32:
            torch.set_float32_matmul_precision("high")


def has_fp16() -> bool:
    """Return whether this machine computes with 16-bit floats other than bfloat16."""
    return torch.accelerator.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported()
