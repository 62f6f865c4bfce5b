"""A command line that trains with one thing wrong in it, and the files that it names."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fork_server import Patch, Run
from small import deepspeed_json

from moe_hf import MoEConfig
from moe_hf.checkpoint.manifest import Progress, write_manifest
from moe_hf.checkpoint.topology import Topology

MODEL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}

# A command line with which nothing is wrong. Paths are relative to the case's own folder.
FLAGS = {
    "config_name": "../common/model.json",
    "tokenizer_name": "../common/tokenizer",
    "train_file": "../common/text.jsonl",
    "validation_split_percentage": 0,
    "block_size": 16,
    "max_steps": 1,
    "per_device_train_batch_size": 1,
    "deepspeed": "../common/deepspeed.json",
    "output_dir": "out",
    "do_train": True,
}
RESET_ALONE = {"resume_from_checkpoint": None, "reset_optimizer": True}
FROM_FOLDER = {"config_name": None, "model_name_or_path": "../common/model"}


@dataclass(frozen=True)
class Case:
    """One wrong command line and what is said about it."""

    name: str
    flags: dict
    """Change `FLAGS`; `None` leaves a flag out."""
    says: str
    """Part of the sentence: the field, its value and what would be right."""
    words: tuple[str, ...] = ()
    """Stand before the flags."""
    files: dict[str, str | dict] = field(default_factory=dict)
    """In the case's folder; a dict is written as JSON."""
    checkpoint: Callable[[Path], None] | None = None
    """Makes an earlier run's checkpoint at `out/checkpoint-3`."""
    ranks: int = 2
    nodes: int = 1
    patches: tuple[Patch, ...] = ()


def saved(changes: dict | None = None, model: dict | None = None, spoil: Callable | None = None) -> Callable:
    """Return a function that makes a checkpoint of the layout and model of `FLAGS`, but for the changes."""

    def make(folder: Path) -> None:
        state = folder / "global_step3" / "zero_states.pt"
        state.parent.mkdir(parents=True)
        state.write_bytes(bytes(1000))
        layout = {"world_size": 2, "expert_parallel_size": 2, "zero_stage": 2, "dtype": "float32"} | (changes or {})
        write_manifest(folder, Topology(**layout), MoEConfig(**MODEL | (model or {})), Progress(step=3))
        if spoil:
            spoil(folder, state)

    return make


def with_json(name: str, says: str, flags: dict | None = None, ranks: int = 2, **sections) -> Case:
    """Return a case with another DeepSpeed JSON; a section `None` is left out."""
    config = {key: value for key, value in deepspeed_json(2, 2, **sections).items() if value is not None}
    return Case(name, {"deepspeed": "ds.json"} | (flags or {}), says, files={"ds.json": config}, ranks=ranks)


def with_data(name: str, says: str, data: str, flags: dict | None = None, file: str = "data.jsonl") -> Case:
    """Return a case with other training data."""
    return Case(name, {"train_file": file} | (flags or {}), says, files={file: data})


def resuming(name: str, says: str, checkpoint: Callable | None, flags: dict | None = None, patches: tuple = ()) -> Case:
    """Return a case that resumes from `out/checkpoint-3`."""
    flags = {"resume_from_checkpoint": "out/checkpoint-3"} | (flags or {})
    return Case(name, flags, says, checkpoint=checkpoint, patches=patches)


TORN = saved(spoil=lambda folder, state: state.unlink())


def prepare(case: Case, folder: Path) -> Run:
    """Make the case's files and its command line."""
    flags = {name: value for name, value in (FLAGS | case.flags).items() if value is not None}
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content) if isinstance(content, dict) else content, errors="surrogateescape")
    if case.checkpoint is not None:
        case.checkpoint(folder / "out" / "checkpoint-3")
    argv = [*case.words, *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    return Run(case.name, argv, str(folder), case.ranks, case.nodes, list(case.patches))
