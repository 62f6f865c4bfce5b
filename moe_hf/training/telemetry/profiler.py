"""Traces of single steps by `torch.profiler`: which operators ran when, for how long, on which tensors."""

import re
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, profile
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ...errors import ConfigError
from ...parallel.processes import rank

PROFILE_NAME = "profile"
# Of the table that is printed.
_NUM_OPERATORS = 12


def parse_steps(text: str) -> range:
    """Return the optimizer steps that `FIRST:END` means: from the first, counted from 1, up to but without the end.

    Raises:
        ConfigError: it is not of that form, or means no step.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(found[1]), int(found[2])) if found else range(0)
    if not steps or steps.start < 1:
        raise ConfigError(
            f"profile_steps={text} must be FIRST:END with 1 <= FIRST < END, like 10:13 for 10, 11 and 12."
        )
    return steps


class StepProfiler(TrainerCallback):
    """Trace a range of optimizer steps on every rank, each into a file that Perfetto and chrome://tracing open.

    A step lasts from the end of the one before, so that reading its data belongs to it; in the trace it is
    `ProfilerStep#N`, with the number that the log has for it. The step before the first is traced too and thrown away:
    the first that is traced is slow. Outside of these steps nothing is attached to anything.

    Args:
        steps: counted from 1.
        output_dir: of the run; the traces go to `profile/rankN.json.gz` in it.
    """

    def __init__(self, steps: range, output_dir: str) -> None:
        self._steps = steps
        self._path = Path(output_dir) / PROFILE_NAME / f"rank{rank()}.json.gz"
        self._profile: profile | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start if the first step that is made is one to trace."""
        self._go_on(next_step=state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Start, go on or write, as the next step asks for."""
        if control.should_training_stop:
            self.finish()
        else:
            self._go_on(next_step=state.global_step + 1)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Say so if the run has ended before the first step to trace."""
        if state.global_step < self._steps.start and rank() == 0:
            tqdm.write(f"Nothing was traced: training ended after step {state.global_step}, before the first to trace.")

    def finish(self) -> None:
        """Write what has been traced so far; call it when a run ends, however it does."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _go_on(self, next_step: int) -> None:
        if self._profile is not None:
            self._profile.step()
            if next_step >= self._steps.stop:
                self.finish()
        elif self._steps.start - 1 <= next_step < self._steps.stop:
            self._profile = profile(
                schedule=self._action, on_trace_ready=self._write, record_shapes=True, profile_memory=True
            )
            # Numbers of the profiler are those of the run.
            self._profile.step_num = next_step
            self._profile.current_action = self._action(next_step)
            self._profile.start()

    def _action(self, step: int) -> ProfilerAction:
        if step not in self._steps:
            return ProfilerAction.WARMUP if step == self._steps.start - 1 else ProfilerAction.NONE
        return ProfilerAction.RECORD_AND_SAVE if step == self._steps[-1] else ProfilerAction.RECORD

    def _write(self, finished: profile) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self._path))
        if rank() == 0:
            by = "self_cpu_time_total" if not torch.cuda.is_available() else "self_cuda_time_total"
            table = finished.key_averages().table(sort_by=by, row_limit=_NUM_OPERATORS, max_name_column_width=40)
            tqdm.write(f"{table}\nThe trace is {self._path}; open it in https://ui.perfetto.dev.")
