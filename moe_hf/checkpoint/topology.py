"""Record what a checkpoint was trained on, and refuse to resume on anything else.

DeepSpeed loads a checkpoint of another expert-parallel size without an error and puts the fp32 master weights on the
wrong experts, so this is checked before it loads anything.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..configuration_moe import MoEConfig
from ..errors import CheckpointError

TOPOLOGY_NAME = "topology.json"

# Fields of the configuration that decide which tensors there are and what is computed with them.
_ARCHITECTURE_FIELDS = (
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
    "use_qk_norm",
    "qk_norm_scope",
    "attention_gate",
    "attention_bias",
    "shared_expert_intermediate_size",
    "shared_expert_gate",
    "tie_word_embeddings",
    "norm_topk_prob",
    "routed_scaling_factor",
    "rms_norm_eps",
    "rope_parameters",
)

_WORDS = {
    "world_size": "number of processes",
    "expert_parallel_size": "expert-parallel size",
    "zero_stage": "ZeRO stage",
    "dtype": "training dtype",
}


@dataclass(frozen=True)
class Topology:
    """How a run is laid out over processes; `expert_parallel_size` 0 is AutoEP off, `zero_stage` -1 no DeepSpeed."""

    world_size: int
    expert_parallel_size: int
    zero_stage: int
    dtype: str

    def describe(self) -> str:
        """Return the layout in words, such as `2 processes, ZeRO 3, EP 2, bfloat16`."""
        zero = "no DeepSpeed" if self.zero_stage < 0 else f"ZeRO {self.zero_stage}"
        expert = f"EP {self.expert_parallel_size}" if self.expert_parallel_size else "EP off"
        return f"{self.world_size} processes, {zero}, {expert}, {self.dtype}"


def write_topology(checkpoint: Path, topology: Topology, config: MoEConfig) -> None:
    """Write the record, with the size of every file of the checkpoint. It comes last: with it a checkpoint is whole."""
    files = sorted(
        path for path in checkpoint.rglob("*") if path.is_file() and _belongs_to_state(path.relative_to(checkpoint))
    )
    record = {
        "topology": asdict(topology),
        "architecture": {name: getattr(config, name) for name in _ARCHITECTURE_FIELDS},
        "files": {str(path.relative_to(checkpoint)): path.stat().st_size for path in files},
    }
    temporary = checkpoint / f".{TOPOLOGY_NAME}"
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(checkpoint / TOPOLOGY_NAME)


def _belongs_to_state(path: Path) -> bool:
    """Leave out the export in `hf/`, from which only a run without DeepSpeed resumes; it verifies itself."""
    return path.name not in (TOPOLOGY_NAME, f".{TOPOLOGY_NAME}") and path.parts[0] != "hf"


def check_resumable(checkpoint: Path, topology: Topology, config: MoEConfig) -> None:
    """Raise `CheckpointError` unless the checkpoint is whole and fits this model and this layout.

    Args:
        checkpoint: a `checkpoint-N` folder.
        topology: of the run that wants to resume.
        config: its model.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"There is no checkpoint at {checkpoint}; give a checkpoint-N folder of an earlier run.")
    saved, architecture, files = _read_record(checkpoint)
    _check_files(checkpoint, files)
    for name, value in architecture.items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"{checkpoint} holds another model: {name}={value} there but {getattr(config, name)} here; "
                "give the configuration it was trained with."
            )
    for field in fields(Topology):
        before, now = getattr(saved, field.name), getattr(topology, field.name)
        if before != now:
            raise CheckpointError(
                f"{checkpoint} was written by {saved.describe()}, but this run has {topology.describe()}: the "
                f"{_WORDS[field.name]} must stay {before}. To go on with another layout start from its weights: "
                f"--model_name_or_path {checkpoint / 'hf'}."
            )


def is_whole(checkpoint: Path) -> bool:
    """Return whether a `checkpoint-N` folder has its record and every file that the record names."""
    try:
        _check_files(checkpoint, _read_record(checkpoint)[2])
    except CheckpointError:
        return False
    return True


def _read_record(checkpoint: Path) -> tuple[Topology, dict, dict[str, int]]:
    path = checkpoint / TOPOLOGY_NAME
    try:
        record = json.loads(path.read_text())
        saved = Topology(**record["topology"])
        architecture, files = record["architecture"], record["files"]
        if architecture.keys() - _ARCHITECTURE_FIELDS or not isinstance(files, dict):
            raise ValueError("of another form")
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint} has no {TOPOLOGY_NAME}, so it is not a whole checkpoint of run_clm_moe.py; "
            "resume from another."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is damaged; resume from another checkpoint.") from None
    return saved, architecture, files


def _check_files(checkpoint: Path, files: dict[str, int]) -> None:
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{checkpoint} is torn: {name} is missing; resume from another checkpoint.")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{checkpoint} is torn: {name} has {path.stat().st_size} bytes instead of {size}; "
                "resume from another checkpoint."
            )
