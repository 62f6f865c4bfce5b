"""How a run is laid out over processes and optimizer groups, and what of its model a checkpoint depends on."""

from dataclasses import dataclass

from ..configuration_moe import MoEConfig

# Fields of the configuration that decide which tensors there are and what is computed with them.
ARCHITECTURE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "mlp_layer_types",
    "num_experts",
    "num_experts_per_tok",
    "scoring_func",
    "n_group",
    "topk_group",
    "group_scoring_func",
    "router_balancing",
    "use_qk_norm",
    "qk_norm_scope",
    "attention_gate",
    "attention_bias",
    "attention_output_bias",
    "shared_expert_intermediate_size",
    "shared_expert_gate",
    "tie_word_embeddings",
    "norm_topk_prob",
    "routed_scaling_factor",
    "rms_norm_eps",
    "rope_parameters",
)


@dataclass(frozen=True)
class Topology:
    """How a run is laid out over processes; `expert_parallel_size` 0 is AutoEP off, `zero_stage` -1 no DeepSpeed.

    `routers` says where the optimizer has the routers' weights: `"shared"`, in the group of the other matrices;
    `"own"`, in a group of their own, which comes after the usual two; `"frozen"`, nowhere. `optimizer` says whose
    states it holds.
    """

    world_size: int
    expert_parallel_size: int
    zero_stage: int
    dtype: str
    routers: str = "shared"
    optimizer: str = "adamw"
    tensor_parallel_size: int = 1
    sequence_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    @property
    def has_deepspeed(self) -> bool:
        """Whether the state of a run lies in DeepSpeed's files; without it the weights are the export in `hf/`."""
        return self.zero_stage >= 0

    @property
    def num_data_ranks(self) -> int:
        """How many ranks read rows of their own; those that share matrices, sequences or layers read the same."""
        shared = self.tensor_parallel_size * self.sequence_parallel_size * self.pipeline_parallel_size
        return self.world_size // shared

    def describe(self) -> str:
        """Return the layout in words, such as `2 processes, ZeRO 3, EP 2, bfloat16`."""
        zero = f"ZeRO {self.zero_stage}" if self.has_deepspeed else "no DeepSpeed"
        expert = f"EP {self.expert_parallel_size}" if self.expert_parallel_size else "EP off"
        names = {"TP": self.tensor_parallel_size, "SP": self.sequence_parallel_size, "PP": self.pipeline_parallel_size}
        others = "".join(f", {name} {size}" for name, size in names.items() if size > 1)
        routers = {"own": ", routers in a group of their own", "frozen": ", routers frozen"}.get(self.routers, "")
        optimizer = "" if self.optimizer == "adamw" else f", {self.optimizer}"
        return f"{self.world_size} processes, {zero}, {expert}{others}, {self.dtype}{routers}{optimizer}"


def architecture_of(config: MoEConfig) -> dict:
    """Return the fields of a configuration that a checkpoint must share with the model that resumes from it."""
    return {name: getattr(config, name) for name in ARCHITECTURE_FIELDS}


def needs_conversion(saved: Topology, now: Topology) -> bool:
    """Return whether a checkpoint of the layout `saved` has to be cut anew before a run of the layout `now` loads it.

    DeepSpeed loads a checkpoint of another expert-parallel size without an error and puts the fp32 master weights on
    the wrong experts, so this is asked before it loads anything. It does not know one group of the optimizer from
    another either. Without DeepSpeed nothing is cut.
    """
    return saved.has_deepspeed and saved != now


def what_must_stay(saved: Topology, now: Topology) -> str | None:
    """Return why no conversion leads from one layout to the other, such as `the training dtype must stay bfloat16`."""
    if saved.dtype != now.dtype:
        return f"the training dtype must stay {saved.dtype}"
    if saved.has_deepspeed != now.has_deepspeed:
        return "DeepSpeed must stay on" if saved.has_deepspeed else "DeepSpeed must stay off"
    for name in ("tensor_parallel_size", "sequence_parallel_size", "pipeline_parallel_size"):
        if getattr(saved, name) != getattr(now, name):
            return f"{name} must stay {getattr(saved, name)}"
        if getattr(saved, name) > 1 and needs_conversion(saved, now):
            return f"the layout must stay, because checkpoints with {name}={getattr(saved, name)} cannot be cut anew"
    if saved.optimizer != now.optimizer:
        return f"the optimizer must stay {saved.optimizer}"
    if saved.optimizer != "adamw" and needs_conversion(saved, now):
        return "the layout must stay, because only the states of AdamW can be cut anew"
    if saved.has_deepspeed and saved.routers == "frozen" != now.routers:
        # ZeRO counts the steps of whole groups: Adam would take moments that are missing for means over all of them.
        return "--freeze_router must stay, because the checkpoint has no optimizer states of the routers"
    return None
