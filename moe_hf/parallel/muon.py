"""Which parameters DeepSpeed's Muon orthogonalises, and which combinations with it are refused.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a hidden matrix by the
nearest semi-orthogonal matrix; everything else is left to Adam. DeepSpeed takes every matrix outside embeddings and
head for hidden. A router is none: it is the head of a classifier over experts.
"""

from collections.abc import Sequence

from torch import nn

from ..errors import ConfigError
from ..parameter_families import family_of
from .deepspeed_config import Config, get_section, lookup, zero_stage

_HIDDEN_FAMILIES = ("attention", "dense_mlp", "experts")


def uses_muon(config: Config | None) -> bool:
    """Return whether the DeepSpeed JSON names Muon as its optimizer."""
    return config is not None and str(lookup(config, "optimizer.type", "")).lower() == "muon"


def check_muon(config: Config, *, max_grad_norm: float, fp16: bool) -> None:
    """Refuse a JSON under which DeepSpeed's Muon would fail, or make other steps than Muon's.

    Args:
        config: the DeepSpeed JSON, with Muon as its optimizer.
        max_grad_norm: norm at which gradients are clipped; 0 for no clipping.
        fp16: whether the run is in FP16.

    Raises:
        ConfigError: with the first mistake found.
    """
    stage, zero = zero_stage(config), get_section(config, "zero_optimization")
    if stage == 0:
        raise ConfigError("optimizer.type=Muon needs a sharded optimizer; use ZeRO stage 1, 2 or 3")
    if fp16:
        raise ConfigError("optimizer.type=Muon has updates that no loss scale fits; use --bf16 instead of --fp16")
    if max_grad_norm:
        raise ConfigError(
            f"--max_grad_norm {max_grad_norm} beside optimizer.type=Muon would clip its orthogonal updates instead of "
            "gradients; add --max_grad_norm 0"
        )
    if stage == 3 and zero.get("reduce_scatter", True) is not False:
        raise ConfigError(
            'optimizer.type=Muon needs whole gradients at ZeRO 3; add "reduce_scatter": false to zero_optimization'
        )
    if lookup(config, "zero_optimization.offload_optimizer.device", "none") != "none":
        raise ConfigError("optimizer.type=Muon is not offloaded here; delete zero_optimization.offload_optimizer")


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Return whether a parameter is a matrix, or one per expert, between embeddings and head, and no router.

    Args:
        name: in an engine or in an exported model.
        shape: of the whole parameter.
    """
    return len(shape) >= 2 and min(shape[-2:]) > 1 and family_of(name) in _HIDDEN_FAMILIES


def leave_others_to_adam() -> None:
    """Let DeepSpeed's engine mark only hidden matrices for Muon. Calling it again changes nothing."""
    import deepspeed

    mark = deepspeed.set_optimizer_flags
    if getattr(mark, "only_hidden", False):
        return

    def mark_hidden(engine_config, model: nn.Module) -> None:
        mark(engine_config, model)
        for name, param in model.named_parameters():
            if getattr(param, "use_muon", False):
                # What zero.Init has partitioned looks flat.
                param.use_muon = is_hidden_matrix(name, getattr(param, "ds_shape", param.shape))

    mark_hidden.only_hidden = True
    deepspeed.set_optimizer_flags = mark_hidden
