"""Tokens per second, the share of the hardware's peak that they use (MFU), and the peak of memory."""

import resource
import sys
import time

import torch

from ...configuration_moe import MoEConfig
from ...parallel.processes import world_size
from ...planning.flops import TokenFlops, flops_per_token
from ...planning.hardware import peak_tflops_of


def peak_memory_gib() -> float:
    """Return this process's peak of memory so far, in GiB: allocated on the accelerator, or else resident."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated() / 2**30
    # Linux counts it in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Throughput:
    """Speed of training between two log entries; evaluating and saving are left out of it.

    Args:
        config: of the model.
        peak_tflops: of one device, in TFLOP/s; `None` for that of the GPU, if it is a known one. Without a peak there
            is no MFU.
    """

    def __init__(self, config: MoEConfig, peak_tflops: float | None = None) -> None:
        if peak_tflops is None and torch.cuda.is_available():
            peak_tflops = peak_tflops_of(torch.cuda.get_device_name())
        self._config = config
        # Counting parameters takes a while, so it is done once.
        self._of_one_token_row = flops_per_token(config, sequence_length=1)
        self._peak_tflops = peak_tflops
        self._num_devices = world_size()
        self.restart_clock()

    def describe(self, sequence_length: int) -> str:
        """Return the formula of the MFU with the numbers of this run, for the beginning of training."""
        config = self._config
        flops = TokenFlops(self._of_one_token_row.matmul, self._of_one_token_row.attention * sequence_length)
        text = (
            f"FLOPs per token = 6 * {flops.matmul // 6:,} active matrix parameters + 6 * {config.num_hidden_layers} "
            f"layers * {sequence_length} tokens * {config.num_attention_heads} heads * {config.head_dim} = "
            f"{flops.total:,}; "
        )
        if self._peak_tflops is None:
            return text + "no MFU, because the device's peak is not known (--peak_tflops gives it)."
        return (
            f"{text}MFU = tokens/s * {flops.total:,} / ({self._num_devices} devices * {self._peak_tflops:g} TFLOP/s)."
        )

    def add_step(self, num_tokens: torch.Tensor | int, sequence_length: int) -> None:
        """Count one optimizer step over `num_tokens` unmasked tokens of all ranks, in rows of `sequence_length`."""
        self._tokens = self._tokens + num_tokens
        # Not FLOPs: of many tokens they are more than an int64 tensor holds.
        self._attended = self._attended + num_tokens * sequence_length

    def restart_clock(self) -> None:
        """Leave what came before (evaluating, saving) out."""
        self._tokens: torch.Tensor | int = 0
        self._attended: torch.Tensor | int = 0
        self._started = time.perf_counter()

    def pop(self) -> dict[str, float]:
        """Return `tokens_per_second` and, where the peak is known, `mfu` since the last call, and start anew."""
        # Reading the count waits for the device, so it comes before the clock.
        num_tokens, attended = int(self._tokens), int(self._attended)
        seconds = time.perf_counter() - self._started
        self.restart_clock()
        if num_tokens == 0:
            return {}
        logs = {"tokens_per_second": num_tokens / seconds}
        if self._peak_tflops is not None:
            flops = num_tokens * self._of_one_token_row.matmul + attended * self._of_one_token_row.attention
            logs["mfu"] = flops / seconds / (self._num_devices * self._peak_tflops * 1e12)
        return logs
