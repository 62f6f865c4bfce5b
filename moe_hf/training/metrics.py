"""What training reports besides the loss: its parts, router losses by layer, and throughput."""

import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

from ..modeling_moe import MoECausalLMOutput
from ..parallel.processes import world_size

METRICS_NAME = "metrics.jsonl"

logger = logging.get_logger(__name__)


class TrainingMetrics:
    """Sums of the loss's parts between two log entries, kept on the device until one is due.

    Args:
        sparse_layers: index of each sparse layer, for the names of the metrics.
        shares_are_sums: whether the parts of one batch add up over ranks (`num_items_in_batch` counted over all of
            them) or are means of one rank each.
    """

    def __init__(self, sparse_layers: list[int], shares_are_sums: bool) -> None:
        self._sparse_layers = sparse_layers
        self._divisor = 1 if shares_are_sums else world_size()
        self._sums: torch.Tensor | None = None
        self._tokens: torch.Tensor | int = 0
        self._num_steps = 0
        self._started = time.perf_counter()

    def add_micro_batch(self, outputs: MoECausalLMOutput) -> None:
        """Add the parts of one micro-batch's loss."""
        parts = [outputs.ce_loss.detach().reshape(1)]
        if outputs.layer_aux_losses is not None:
            parts += [outputs.layer_aux_losses, outputs.layer_z_losses]
        parts = torch.cat([part.float() for part in parts])
        self._sums = parts if self._sums is None else self._sums + parts

    def add_step(self, num_tokens: torch.Tensor | int) -> None:
        """Count one optimizer step over `num_tokens` unmasked tokens, as many as the losses are means over."""
        self._num_steps += 1
        self._tokens = self._tokens + num_tokens

    def restart_clock(self) -> None:
        """Leave what came before (evaluating, saving) out of the throughput."""
        self._tokens, self._started = 0, time.perf_counter()

    def pop(self) -> dict[str, float]:
        """Return the means over the steps since the last call, the same on every rank (a collective call)."""
        if self._sums is None or self._num_steps == 0:
            return {}
        sums = self._sums.clone()
        if dist.is_initialized() and world_size() > 1:
            dist.all_reduce(sums)
        ce_loss, *layers = (sums / (self._num_steps * self._divisor)).tolist()
        num_layers = len(layers) // 2
        aux, z = layers[:num_layers], layers[num_layers:]
        logs = {"ce_loss": ce_loss}
        if layers:
            logs |= {"aux_loss": sum(aux), "z_loss": sum(z)}
            names = self._sparse_layers
            logs |= {f"aux_loss/layer_{i}": value for i, value in zip(names, aux, strict=True)}
            logs |= {f"z_loss/layer_{i}": value for i, value in zip(names, z, strict=True)}
        if (num_tokens := int(self._tokens)) > 0:
            logs["tokens_per_second"] = num_tokens / (time.perf_counter() - self._started)
        self._sums, self._num_steps = None, 0
        self.restart_clock()
        return logs


class JsonLinesCallback(TrainerCallback):
    """Append every log entry to `metrics.jsonl` in the output folder; what is NaN or infinite is null there."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs:
            entry = {"step": state.global_step, **logs}
            finite = {key: None if _is_not_finite(value) else value for key, value in entry.items()}
            try:
                Path(args.output_dir).mkdir(parents=True, exist_ok=True)
                with open(Path(args.output_dir) / METRICS_NAME, "a") as file:
                    file.write(json.dumps(finite) + "\n")
            except OSError as error:
                # No reason to stop: where the disk is full, the next checkpoint will say so.
                logger.warning_once(f"{METRICS_NAME} cannot be written: {error.strerror}.")


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class ConsoleCallback(ProgressCallback):
    """Progress bars, and each log entry as one line that a person can read."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs:
            line = format_logs(state.global_step, state.max_steps, logs)
            if self.training_bar is not None:
                self.training_bar.write(line)
            else:
                print(line, flush=True)


class PlainConsoleCallback(PrinterCallback):
    """The same lines without progress bars (`--disable_tqdm`)."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs:
            print(format_logs(state.global_step, state.max_steps, logs), flush=True)


def format_logs(step: int, max_steps: int, logs: dict[str, float]) -> str:
    """Return one line such as `step 20/400 | loss 7.1301 | ce 7.1180 | aux 1.02 1.10 | z 0.31 | lr 3.0e-04 | …`.

    The numbers after `aux` are those of the sparse layers, or their range where there are more than eight.
    """
    shown = [f"step {step}/{max_steps}"]
    if "eval_loss" in logs:
        shown += [f"eval loss {logs['eval_loss']:.4f}", f"perplexity {logs['eval_perplexity']:.2f}"]
    elif "loss" in logs:
        shown += [f"loss {float(logs['loss']):.4f}"]
        shown += [f"ce {logs['ce_loss']:.4f}"] if "ce_loss" in logs else []
        for name in ("aux", "z"):
            layers = [value for key, value in logs.items() if key.startswith(f"{name}_loss/")]
            if len(layers) > 8:
                shown.append(f"{name} {min(layers):.3f}…{max(layers):.3f}")
            elif layers:
                shown.append(f"{name} {' '.join(f'{value:.3f}' for value in layers)}")
        shown += [f"grad norm {float(logs['grad_norm']):.3f}"] if logs.get("grad_norm") is not None else []
        shown += [f"lr {float(logs['learning_rate']):.2e}"] if "learning_rate" in logs else []
        shown += [f"{logs['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in logs else []
        shown += [f"skipped {logs['skipped_steps']}"] if logs.get("skipped_steps") else []
    else:
        shown += [f"{key} {value:.4g}" for key, value in logs.items() if isinstance(value, (int, float))]
    return " | ".join(shown)
