"""As `worker.py`, and keep the float32 weights and both Adam moments that an engine holds.

They are read through DeepSpeed's own accessors, parameter by parameter, before the first step of a run and after each
save, and left in `OUTPUT_DIR/state_STEP.pt` under their Hugging Face names.
"""

from pathlib import Path

import torch
import torch.distributed as dist
import worker
from deepspeed import zero
from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_optimizer_state
from transformers import TrainerCallback

STATES = ("fp32", "exp_avg", "exp_avg_sq")


class StateRecorder(TrainerCallback):
    """Writes what the engine of a trainer holds."""

    def __init__(self, trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if args.resume_from_checkpoint is not None:
            self._record(Path(args.output_dir) / f"state_{state.global_step}.pt")

    def on_save(self, args, state, control, **kwargs) -> None:
        self._record(Path(args.output_dir) / f"state_{state.global_step}.pt")

    def _record(self, path: Path) -> None:
        engine = self._trainer.model_wrapped
        if engine.zero_optimization_stage() in (1, 2):
            # DeepSpeed lets its accessors find the states after the first group's first step, when others have none.
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        whole = {key: worker.assemble(engine.module, lambda param, key=key: read(engine, param, key)) for key in STATES}
        if dist.get_rank() == 0:
            # What is frozen has no moments.
            torch.save({key: {name: t for name, t in whole[key].items() if t is not None} for key in STATES}, path)


def read(engine, param: torch.nn.Parameter, key: str) -> torch.Tensor | None:
    """Return the float32 weight or a moment of a parameter, as far as this rank's experts go."""
    if not param.requires_grad:
        with zero.GatheredParameters([param]):
            return param.detach().float().clone() if key == "fp32" else None
    if engine.zero_optimization_stage() == 0:
        return read_whole(engine.optimizer, param, key)
    value = safe_get_full_fp32_param(param) if key == "fp32" else safe_get_full_optimizer_state(param, key)
    return value.detach().clone()


def read_whole(optimizer, param: torch.nn.Parameter, key: str) -> torch.Tensor:
    """As `read`, at ZeRO 0, where in 16 bits the optimizer keeps a float32 copy of each parameter."""
    if hasattr(optimizer, "fp16_groups"):
        own = [param for group in optimizer.fp16_groups for param in group]
        copies = [param for group in optimizer.fp32_groups for param in group]
        param = next(copy for candidate, copy in zip(own, copies, strict=True) if candidate is param)
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    value = param if key == "fp32" else optimizer.state[param][key]
    return value.detach().clone()


def main() -> None:
    build = worker.build_trainer

    def build_recorded(argv, relay):
        # DeepSpeed slices a Universal Checkpoint by the largest expert-parallel group that the process ever had.
        groups._EXPERT_PARALLEL_GROUP.clear()
        groups._EXPERT_DATA_PARALLEL_GROUP.clear()
        trainer = build(argv, relay)
        trainer.add_callback(StateRecorder(trainer))
        return trainer

    worker.build_trainer = build_recorded
    worker.main()


if __name__ == "__main__":
    main()
