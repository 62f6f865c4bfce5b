"""What every process of the self-test does: the runs of a plan, one after the other, as run_clm_moe.py does them.

The launcher starts it as `python -m moe_hf.doctor.worker PLAN`. Each run goes through `build_trainer` and `execute`;
rank 0 writes what the trainer has logged, and whole weights that were put together by another way than the export's.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..parallel.assembled import assembled_weights
from ..parallel.failure import FailureRelay
from ..parallel.processes import rank, world_size
from ..training.launch import main
from ..training.run import build_trainer, execute
from .exchange import measure_exchange
from .exported import GATHERED_NAME
from .phases import PhaseLog

PHASES, ERRORS, RESULTS = "phases", "errors", "results"


def run_plan(argv: list[str], relay: FailureRelay, description: str | None = None) -> None:
    """Do all runs of a plan, which is a JSON file: {`cases`: [{`name`, `argv`, `gathers`}]}."""
    path = Path(argv[-1])
    cases, folder = json.loads(path.read_text())["cases"], path.parent
    log = PhaseLog(folder / PHASES, rank())
    with _errors_recorded(folder / ERRORS, log):
        log.begin("joining the others, after compiling what DeepSpeed has not yet compiled here")
        for number, case in enumerate(cases):
            start = time.monotonic()
            results = _run_case(case, relay, log, measures=number == 0)
            if rank() == 0:
                results["seconds"] = time.monotonic() - start
                (folder / RESULTS).mkdir(exist_ok=True)
                (folder / RESULTS / f"{case['name']}.json").write_text(json.dumps(results))
        log.begin("leaving")


def _run_case(case: dict, relay: FailureRelay, log: PhaseLog, *, measures: bool) -> dict:
    # What the run before has left in Accelerate and Transformers.
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    name, results = case["name"], {}
    trainer = build_trainer(case["argv"], relay)
    if measures and world_size() > 1:
        log.begin("exchanging tensors")
        results["exchange"] = measure_exchange(trainer.args.device)
    log.begin(f"{name}: building the engine")
    trainer.add_callback(_Steps(name, log))
    execute(trainer)
    results["steps"] = [
        {"step": entry["step"], "loss": entry["loss"], "grad_norm": entry["grad_norm"]}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    results["device"] = trainer.args.device.type
    if case["gathers"]:
        log.begin(f"{name}: gathering the weights")
        weights = assembled_weights(trainer.accelerator.unwrap_model(trainer.model))
        if weights is not None:
            tensors = {key: tensor.contiguous() for key, tensor in weights.items()}
            save_file(tensors, Path(trainer.args.output_dir) / GATHERED_NAME)
    del trainer
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
    return results


class _Steps(TrainerCallback):
    """Tells in which step the trainer is, and when it exports."""

    def __init__(self, name: str, log: PhaseLog) -> None:
        self._name, self._log = name, log

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._log.begin(f"{self._name}: step {state.global_step + 1}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._log.begin(f"{self._name}: exporting")


@contextmanager
def _errors_recorded(folder: Path, log: PhaseLog) -> Iterator[None]:
    """Leave a note on what ended this process, and in which phase, whatever the launcher makes of it."""
    try:
        yield
    except Exception as error:
        folder.mkdir(exist_ok=True)
        note = {
            "rank": rank(),
            "phase": log.name,
            "type": type(error).__name__,
            "message": " ".join(str(error).split()),
        }
        (folder / f"{rank()}.json").write_text(json.dumps(note))
        raise


if __name__ == "__main__":
    main(run_plan, sys.argv[1:])
