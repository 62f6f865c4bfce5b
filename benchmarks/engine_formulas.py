"""What `moe-hf plan` predicts of a rank's states and messages, in the units in which an engine is measured."""

from moe_hf import MoEConfig
from moe_hf.planning.communication import collectives
from moe_hf.planning.gathering import gathering
from moe_hf.planning.memory import total
from moe_hf.planning.parameters import local_parameters, optimizer_groups
from moe_hf.planning.setting import Setting
from moe_hf.planning.states import state_amounts

STATES = ("weights", "gradients", "optimizer")

# A copy in float32, and Adam's two moments.
_OF_OPTIMIZER = 12

OPERATIONS = ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
"""All that carries weights, gradients or tokens; `prof_all` would end the process at the first call unknown to it."""

# Of all n ranks together, times what each hands in. A reduce scatters, then all send their part to the one that asks:
# over NCCL it would be n - 1. An all-reduce scatters and gathers, and an all-gather is handed a share.
_SENT_OVER_GLOO = {
    "all_reduce": lambda n: 2 * (n - 1),
    "reduce": lambda n: (n - 1) * (1 + 1 / n),
    "all_gather_into_tensor": lambda n: n * (n - 1),
}

LOGGED = {"enabled": True, "verbose": False, "prof_all": False, "debug": False, "prof_ops": list(OPERATIONS)}
"""The section `comms_logger` of a DeepSpeed JSON with which they are counted."""


def predicted_states(config: MoEConfig, setting: Setting, rank: int) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer states on a rank."""
    amounts = state_amounts(optimizer_groups(config, setting), setting, rank)
    return {kind: total(amounts, kind=kind) for kind in STATES}


def ideal_states(config: MoEConfig, setting: Setting) -> dict[str, float]:
    """Return the bytes of weights, gradients and optimizer states on a rank, if ZeRO could cut anywhere.

    Of a weight: whole in 16 bits, or divided by its ranks from stage 3 on; its gradient likewise, from stage 2 on; and
    12 bytes an element, divided, for the optimizer's copy and two moments.
    """
    parameters = local_parameters(config, setting)
    whole = setting.item_size * sum(part.numel for part in parameters)
    divided = setting.item_size * sum(part.numel / part.ranks for part in parameters)
    stage = setting.zero.stage
    return {
        "weights": divided if stage == 3 else whole,
        "gradients": divided if stage >= 2 else whole,
        "optimizer": _OF_OPTIMIZER * sum(part.numel / part.ranks for part in parameters),
    }


def predicted_messages(config: MoEConfig, setting: Setting) -> dict[str, float]:
    """Return the bytes that a rank hands to each operation in one optimizer step, on average over ranks."""
    gathered = gathering(local_parameters(config, setting), config, setting) if setting.zero.stage == 3 else None
    predicted = dict.fromkeys(OPERATIONS, 0)
    for collective in collectives(optimizer_groups(config, setting), config, setting, gathered):
        predicted[collective.operation] += collective.message
    return predicted


def predicted_sent(config: MoEConfig, setting: Setting) -> float:
    """Return the bytes that all ranks together send over gloo in one optimizer step of ZeRO 0 to 2 without AutoEP.

    Raises:
        KeyError: an operation whose bytes over gloo are not known.
    """
    messages = predicted_messages(config, setting)
    return sum(_SENT_OVER_GLOO[name](setting.world_size) * message for name, message in messages.items() if message)
