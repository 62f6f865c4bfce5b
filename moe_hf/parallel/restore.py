"""Load a Universal Checkpoint into a fresh engine, and mend what DeepSpeed's loader leaves undone."""

from pathlib import Path

import torch
from torch import nn

_STATES = ("exp_avg", "exp_avg_sq")


def load_universal(engine, folder: Path, tag: str, buffers: dict[str, torch.Tensor]) -> None:
    """Restore weights, optimizer states, counters and buffers; every rank must call it.

    Args:
        engine: fresh from `deepspeed.initialize`.
        folder: holds `latest_universal` and the folder `tag` that it names.
        tag: of the checkpoint in the folder.
        buffers: values of the module's buffers, by the engine's names.
    """
    if engine.zero_optimization_stage() == 0:
        _load_whole(engine, folder / tag / "zero")
    else:
        _load_sliced(engine, folder, tag)
    _load_frozen(engine.module, folder / tag / "zero")
    own = dict(engine.module.named_buffers())
    for name, value in buffers.items():
        own[name].copy_(value)


def _load_sliced(engine, folder: Path, tag: str) -> None:
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
    finally:
        engine._config.load_universal_checkpoint = False
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            # ZeRO 3 gives all groups one tensor, which each of them would then increment.
            state["step"] = state["step"].clone()


def _load_whole(engine, zero: Path) -> None:
    """At stage 0 the optimizer has whole parameters, in 16-bit training as float32 copies of the model's."""
    names = {id(param): name for name, param in engine.module.named_parameters()}
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for group, params in enumerate(_model_parameters(engine)):
        for param, master in zip(params, optimizer.param_groups[group]["params"], strict=True):
            folder = zero / names[id(param)]
            _copy_into(param, master, torch.load(folder / "fp32.pt", weights_only=True)["param"])
            optimizer.state[master] = {"step": torch.load(folder / "step.pt", weights_only=True)} | {
                key: torch.load(folder / f"{key}.pt", weights_only=True)["param"].to(master.device) for key in _STATES
            }
    counters = torch.load(zero.parent / "mp_rank_00_model_states.pt", weights_only=True)
    engine.global_steps, engine.global_samples = counters["global_steps"], counters["global_samples"]
    engine.skipped_steps = counters["skipped_steps"]


@torch.no_grad()
def _load_frozen(module: nn.Module, zero: Path) -> None:
    """Load the parameters that the engine's optimizer does not know, whether or not they were trained before."""
    import deepspeed

    for name, param in module.named_parameters():
        if not param.requires_grad:
            # ZeRO 3 gives the values of rank 0 to the slices of all.
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                param.data.copy_(torch.load(zero / name / "fp32.pt", weights_only=True)["param"])


def _model_parameters(engine) -> list[list[nn.Parameter]]:
    """Return the model's own parameters in the order of the optimizer's."""
    if hasattr(engine.optimizer, "fp16_groups"):
        return engine.optimizer.fp16_groups
    return [group["params"] for group in engine.optimizer.param_groups]


@torch.no_grad()
def _copy_into(param: nn.Parameter, master: nn.Parameter, value: torch.Tensor) -> None:
    master.copy_(value)
    param.copy_(value)
