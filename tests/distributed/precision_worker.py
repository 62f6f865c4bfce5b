"""As `worker.py`, on any CPU also in FP16, and with the loss scale of every step recorded."""

import json

import torch
import worker
from deepspeed.accelerator import get_accelerator
from transformers import TrainerCallback

from moe_hf.training import checked_run


class LossScales(TrainerCallback):
    """Keeps what the loss is multiplied by in each step, and whether the step was skipped."""

    def __init__(self, trainer) -> None:
        self.trainer, self.scales, self.skipped = trainer, [], []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Before the loss is scaled."""
        self.scales.append(self.trainer.deepspeed.optimizer.loss_scale)
        self.skipped.append(self.trainer.deepspeed.skipped_steps)


def allow_fp16() -> None:
    """Let DeepSpeed and our own check take this CPU for one with 16-bit floats: torch computes with them on any."""
    accelerator = get_accelerator()
    dtypes = accelerator.supported_dtypes()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [*dtypes, torch.float16]
    checked_run.has_fp16 = lambda: True


def main() -> None:
    allow_fp16()
    build, record = worker.build_trainer, worker.record
    watched = []

    def build_watched(argv, relay):
        trainer = build(argv, relay)
        if trainer.args.fp16:
            watched.append(LossScales(trainer))
            trainer.add_callback(watched[-1])
        return trainer

    def record_scales(trainer, metrics, error, folder) -> None:
        record(trainer, metrics, error, folder)
        if trainer.args.fp16 and trainer.is_world_process_zero():
            scales = watched.pop()
            skipped = [*scales.skipped, trainer.deepspeed.skipped_steps]
            (folder / "scales.json").write_text(json.dumps({"scales": scales.scales, "skipped": skipped}))

    worker.build_trainer, worker.record = build_watched, record_scales
    worker.main()


if __name__ == "__main__":
    main()
