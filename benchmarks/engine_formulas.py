"""What `moe-hf plan` predicts of a rank's states and messages, in the units in which an engine is measured."""

from moe_hf import MoEConfig
from moe_hf.planning.communication import collectives
from moe_hf.planning.gathering import gathering
from moe_hf.planning.memory import total
from moe_hf.planning.parameters import local_parameters, optimizer_groups
from moe_hf.planning.setting import Setting
from moe_hf.planning.states import state_amounts

STATES = ("weights", "gradients", "optimizer")

OPERATIONS = ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
"""All that carries weights, gradients or tokens; `prof_all` would end the process at the first call unknown to it."""

LOGGED = {"enabled": True, "verbose": False, "prof_all": False, "debug": False, "prof_ops": list(OPERATIONS)}
"""The section `comms_logger` of a DeepSpeed JSON with which they are counted."""


def predicted_states(config: MoEConfig, setting: Setting, rank: int) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer states on a rank."""
    amounts = state_amounts(optimizer_groups(config, setting), setting, rank)
    return {kind: total(amounts, kind=kind) for kind in STATES}


def predicted_messages(config: MoEConfig, setting: Setting) -> dict[str, float]:
    """Return the bytes that a rank hands to each operation in one optimizer step, on average over ranks."""
    gathered = gathering(local_parameters(config, setting), config, setting) if setting.zero.stage == 3 else None
    predicted = dict.fromkeys(OPERATIONS, 0)
    for collective in collectives(optimizer_groups(config, setting), config, setting, gathered):
        predicted[collective.operation] += collective.message
    return predicted
