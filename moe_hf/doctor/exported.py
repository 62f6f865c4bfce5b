"""Whether an exported folder of the self-test is the model that the ranks have trained."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ..checkpoint.manifest import EXPORT_NAME
from ..checkpoint.weights import SafetensorsFolder
from ..configuration_moe import MoEConfig
from ..errors import CheckpointError
from ..modeling_moe import MoEForCausalLM

GATHERED_NAME = "gathered.safetensors"


def problem_of_export(folder: Path, config: MoEConfig) -> str | None:
    """Return what is wrong with the export of a run, in one sentence, or `None`.

    Args:
        folder: of the run; its export is compared with the model's names and shapes, bit for bit with the weights that
            were gathered by another way if they are there, and loaded as a user would.
        config: of the model.
    """
    try:
        exported = SafetensorsFolder(folder / EXPORT_NAME)
    except CheckpointError as error:
        return str(error)
    return _wrong_shapes(exported, config) or _other_than_gathered(exported, folder) or _cannot_be_loaded(folder)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that a run ended with: as they were gathered, or else as they were exported."""
    if (folder / GATHERED_NAME).is_file():
        return load_file(folder / GATHERED_NAME)
    exported = SafetensorsFolder(folder / EXPORT_NAME)
    return {name: exported.read(name) for name in exported.shapes}


def _wrong_shapes(exported: SafetensorsFolder, config: MoEConfig) -> str | None:
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in MoEForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    names = wanted.keys() | exported.shapes.keys()
    wrong = sorted(name for name in names if exported.shapes.get(name) != wanted.get(name))
    return f"{len(wrong)} of {len(wanted)} tensors are missing or misshapen, such as {wrong[0]}" if wrong else None


def _other_than_gathered(exported: SafetensorsFolder, folder: Path) -> str | None:
    if not (folder / GATHERED_NAME).is_file():
        return None
    held = load_file(folder / GATHERED_NAME)
    wrong = [name for name in exported.shapes if not torch.equal(exported.read(name), held[name])]
    return f"{len(wrong)} of {len(held)} tensors are not what the ranks hold, such as {wrong[0]}" if wrong else None


def _cannot_be_loaded(folder: Path) -> str | None:
    try:
        _, info = AutoModelForCausalLM.from_pretrained(folder / EXPORT_NAME, output_loading_info=True)
    except Exception as error:  # whatever it is, a user would meet it
        return f"from_pretrained does not load it: {' '.join(str(error).split())[:200]}"
    left = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    return f"from_pretrained finds {len(left)} tensors missing or left over, such as {left[0]}" if left else None
