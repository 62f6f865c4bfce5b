"""Which optimizer a run has, told before it starts: what its checkpoints hold, and what cannot work."""

import argparse

import torch

from ..errors import ConfigError
from ..parallel.deepspeed_config import lookup
from ..parallel.offload import nvme_sections

# Implementations of AdamW whose states have the same names, shapes and dtype, and with them each other's checkpoints.
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw", "adam")
_DEFAULT = "adamw_torch_fused"
_ADAMW_8BIT = ("adamw_8bit", "adamw_bnb_8bit")

# Their states are tensor subclasses of torchao, which DeepSpeed neither flattens nor saves.
_LOW_BITS_OF_TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")


def optimizer_family(args: argparse.Namespace, deepspeed_json: dict | None = None) -> str:
    """Return whose states a checkpoint of this run holds: `Topology.optimizer`.

    Args:
        args: with `optim`.
        deepspeed_json: of the run, `None` without DeepSpeed; its `optimizer` section comes before the flag.

    Raises:
        ConfigError: an optimizer that does not run here, or two of them.
    """
    of_json = lookup(deepspeed_json or {}, "optimizer.type", None)
    if of_json is not None and args.optim != _DEFAULT:
        raise ConfigError(
            f"--optim {args.optim} has no effect beside optimizer.type={of_json} in the DeepSpeed JSON; leave one out."
        )
    name = str(of_json or args.optim).lower()
    if name in _ADAMW:
        return "adamw"
    if "offload_optimizer" in nvme_sections(deepspeed_json):
        raise ConfigError(
            f"{'--optim' if of_json is None else 'optimizer.type'} {name} was never run with its states on NVMe; use "
            'AdamW, or rest in host memory: "device": "cpu".'
        )
    if name.startswith("paged_") and not torch.cuda.is_available():
        raise ConfigError(f"--optim {name} moves its states between CPU and GPU; without a GPU use adamw_bnb_8bit.")
    if name in _LOW_BITS_OF_TORCHAO and deepspeed_json is not None:
        raise ConfigError(f"--optim {name} has states that DeepSpeed cannot shard; use adamw_bnb_8bit.")
    return "adamw_8bit" if name in _ADAMW_8BIT else name
