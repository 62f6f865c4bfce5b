"""Which files of a folder make up a model: what `from_pretrained` reads, and what it means to have all of it."""

import json
import re
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_moe import MoEConfig
from ..errors import CheckpointError
from .export import expected_tensors
from .weights import SafetensorsFolder, verify_weights

CARD_NAME = "README.md"

_TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
}
_DOCUMENTS = re.compile(r"(README|LICEN[CS]E|NOTICE)(\.md|\.txt)?")
# Weights under any of their names, and what else decides what is loaded.
_LOADED = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)"
    r"|(model\.safetensors|pytorch_model\.bin)\.index\.json"
    r"|additional_chat_templates/[^/]+\.jinja"
)


def is_loaded(name: str) -> bool:
    """Return whether a file of this name, relative to its folder, has a say in what `from_pretrained` loads."""
    return name in _TOKENIZER_FILES | {CONFIG_NAME, GENERATION_CONFIG_NAME} or _LOADED.fullmatch(name) is not None


def export_files(folder: Path) -> tuple[list[str], list[str]]:
    """Check that a folder is a whole export, and say what belongs to it.

    Args:
        folder: an export of this package, or a model of an architecture that Transformers itself has.

    Returns:
        The names of its files relative to it, sorted; and of those that lie there without belonging to it, hidden
        ones aside.

    Raises:
        CheckpointError: the folder is missing, or lacks a file, a tensor or code that its configuration names.
    """
    config = _read_json(folder / CONFIG_NAME, f"{folder} is not a folder with an exported model")
    weights = _weight_files(folder, config)
    code = _code_files(folder, config)
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    found = [name for name in found if not any(part.startswith(".") for part in name.split("/"))]
    belongs = weights | code | {name for name in found if _is_neither(name)}
    return sorted(belongs), [name for name in found if name not in belongs and "__pycache__" not in name]


def _is_neither(name: str) -> bool:
    """Whether a file belongs to the export without being weights, of which only those in use do, or code."""
    is_weights = name.endswith((".safetensors", ".bin", ".index.json"))
    return (is_loaded(name) and not is_weights) or _DOCUMENTS.fullmatch(name) is not None


def _weight_files(folder: Path, config: dict) -> set[str]:
    if config.get("model_type") != MoEConfig.model_type:
        SafetensorsFolder(folder)
    else:
        try:
            own = MoEConfig.from_pretrained(folder)
            verify_weights(folder, expected_tensors(own, own.dtype))
        except CheckpointError as error:
            raise CheckpointError(f"{folder} is not a whole export: {error}") from error
        except Exception as error:  # a strict configuration wraps whatever its fields raise
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{folder / CONFIG_NAME} is not a configuration of moe_hf: {reason}") from error
    if not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return {SAFE_WEIGHTS_NAME}
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())
    return {SAFE_WEIGHTS_INDEX_NAME, *index["weight_map"].values()}


def _code_files(folder: Path, config: dict) -> set[str]:
    """Return the modules that the `auto_map`s name, and those that they import."""
    named = list((config.get("auto_map") or {}).values())
    if config.get("model_type") == MoEConfig.model_type and not named:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} names no code (auto_map), so that only moe_hf itself could load it; "
            "push OUTPUT_DIR/hf of a run."
        )
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = _read_json(folder / "tokenizer_config.json", f"{folder} is not a whole export")
        named += (tokenizer.get("auto_map") or {}).values()
    classes = [name for value in named for name in (value if isinstance(value, (list, tuple)) else [value])]
    modules = {name.split(".")[0] for name in classes if name and "--" not in name}
    try:
        imported = [path for module in modules for path in get_relative_import_files(folder / f"{module}.py")]
    except OSError as error:
        raise CheckpointError(f"{folder} is not a whole export: {error.filename} is not there.") from error
    return {f"{module}.py" for module in modules} | {Path(path).relative_to(folder).as_posix() for path in imported}


def _read_json(path: Path, otherwise: str) -> dict:
    try:
        values = json.loads(path.read_text())
        if isinstance(values, dict):
            return values
        reason = "it holds no object"
    except OSError:
        reason = "it is not there"
    except ValueError as error:
        reason = f"it is not JSON ({error})"
    raise CheckpointError(f"{otherwise}: {path}: {reason}.")
