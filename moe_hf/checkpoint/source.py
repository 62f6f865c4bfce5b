"""Open a model, ours or of another architecture, to read it by our names: its weights stay on disk until asked for."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging

from ..configuration_moe import MoEConfig
from ..errors import CheckpointError, ConfigError
from . import architectures
from .architectures.function import make_config, one_sentence
from .architectures.tensors import Piece, TensorMap
from .export import expected_tensors
from .weights import INDEX_NAME, SINGLE_NAME, SafetensorsFolder

logger = logging.get_logger(__name__)

# What belongs to a model besides its configuration and its weights.
SIDE_FILES = (
    "LICENSE",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Tables of RoPE, which Transformers once saved, and computes.
_COMPUTED = r"(.*\.)?rotary_emb\.inv_freq"


@dataclass(frozen=True)
class MoESource:
    """A model that is read tensor by tensor, by our names.

    Args:
        config: of the model, ours whatever its architecture.
        dtype: the narrowest that holds every stored parameter exactly; nearly always the one they all have.
        read: returns one of our tensors by its name.
        folder: where its files are, those of the tokenizer among them.
        model_type: the architecture it is stored as.
    """

    config: MoEConfig
    dtype: torch.dtype
    read: Callable[[str], torch.Tensor]
    folder: Path
    model_type: str


def open_model(path_or_id: str | Path) -> MoESource:
    """Open a folder or a model of the hub; every name and shape is checked, no weight is read.

    Raises:
        ConfigError: the architecture, or a feature of it, has no counterpart in ours.
        CheckpointError: there is no such model, or its weights are not whole, not safetensors or not of its config.
    """
    folder = local_folder(path_or_id)
    model_type, native = read_native_config(folder)
    if native is None:
        config = read_config(folder)
        expected = expected_tensors(config)
        maps, ignored = [TensorMap([Piece(name, name) for name in expected], expected)], _COMPUTED
    else:
        architecture = architectures.get(model_type)
        config = architecture.to_moe_config(native)
        maps = [architecture.tensors(config, fused=fused) for fused in (False, True)]
        ignored = "|".join([_COMPUTED, *architecture.left_out(native)])
    weights = _open_weights(folder)
    layout = _match(weights, model_type, config, maps, ignored)
    dtype = _common_dtype(weights, layout)

    def read(name: str) -> torch.Tensor:
        return layout.read_moe(name, weights.read, dtype)

    return MoESource(config, dtype, read, folder, model_type)


def local_folder(path_or_id: str | Path) -> Path:
    """Return the folder of a model; one of the hub (`organisation/name`) is downloaded, without pickles and code."""
    path = Path(path_or_id)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_id)):
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path_or_id} is not a folder with a config.json and weights.")
        return path
    patterns = ["config.json", "*.safetensors", INDEX_NAME, *SIDE_FILES]
    try:
        folder = snapshot_download(str(path_or_id), allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"])
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path_or_id} is neither a folder nor a model that the hub gives: {one_sentence(error, first=True)}"
        ) from None
    if not Path(folder, "config.json").is_file():
        raise CheckpointError(f"{path_or_id} has no config.json on the hub, so it is not a model of Transformers.")
    return Path(folder)


def read_native_config(folder: Path) -> tuple[str, PreTrainedConfig | None]:
    """Return the architecture of a folder, and its configuration unless that is ours. No code in it is run."""
    values = _read_json(folder)
    model_type = values.get("model_type")
    if model_type == MoEConfig.model_type:
        return model_type, None
    architectures.get(model_type)
    values.pop("auto_map", None)
    try:
        return model_type, CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:  # a library's own checks raise of every kind: the file is what is wrong
        raise ConfigError(f"{folder / 'config.json'} is not a valid {model_type} one: {one_sentence(error)}") from None


def read_config(folder: Path) -> MoEConfig:
    """Return the configuration of a folder as ours, whatever its architecture."""
    model_type, native = read_native_config(folder)
    if native is not None:
        return architectures.get(model_type).to_moe_config(native)
    dropped = ("model_type", "auto_map", "transformers_version")
    return make_config({name: value for name, value in _read_json(folder).items() if name not in dropped})


def copy_side_files(source: Path, destination: Path) -> None:
    """Copy the tokenizer and the generation configuration as they are."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


def _read_json(folder: Path) -> dict:
    try:
        values = json.loads((folder / "config.json").read_text())
        if not isinstance(values.get("model_type"), str):
            raise ValueError("it names no model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {one_sentence(error)}") from None
    return values


def _open_weights(folder: Path) -> SafetensorsFolder:
    if not (folder / SINGLE_NAME).is_file() and not (folder / INDEX_NAME).is_file():
        if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
            raise CheckpointError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when it is read; "
                "save the model as safetensors first."
            )
        if not any(folder.glob("*.safetensors")):
            raise CheckpointError(f"{folder} holds no *.safetensors file, so there are no weights in it.")
    return SafetensorsFolder(folder)


def _match(
    weights: SafetensorsFolder, model_type: str, config: MoEConfig, maps: Sequence[TensorMap], ignored: str
) -> TensorMap:
    """Choose for each of our tensors the first map whose tensors are there; refuse what is missing, extra or wrong."""
    chosen: list[Piece] = []
    for name in maps[0].expected:
        there = (m.by_moe[name] for m in maps if all(piece.native_name in weights.shapes for piece in m.by_moe[name]))
        if (pieces := next(there, None)) is None:
            missing = next(p.native_name for p in maps[0].by_moe[name] if p.native_name not in weights.shapes)
            raise CheckpointError(f"{weights.folder} lacks {missing}, which its {model_type} configuration asks for.")
        chosen += pieces
    layout = TensorMap(chosen, maps[0].expected)
    for name, tensor in layout.native_tensors().items():
        if (shape := weights.shapes[name]) != tensor.shape:
            raise CheckpointError(
                f"{weights.folder} has {name} of shape {shape}, but its configuration says {tuple(tensor.shape)}."
            )
    surplus = [n for n in weights.shapes if n not in layout.by_native and not re.fullmatch(ignored, n)]
    if "lm_head.weight" in surplus and config.tie_word_embeddings:
        _check_tied(weights)
        surplus.remove("lm_head.weight")
    if surplus:
        raise CheckpointError(f"{weights.folder} holds {surplus[0]}, which its {model_type} configuration has not.")
    return layout


def _check_tied(weights: SafetensorsFolder) -> None:
    if not torch.equal(weights.read("lm_head.weight"), weights.read("model.embed_tokens.weight")):
        raise CheckpointError(
            f"{weights.folder} says tie_word_embeddings=True, but its lm_head.weight is not model.embed_tokens.weight."
        )


def _common_dtype(weights: SafetensorsFolder, layout: TensorMap) -> torch.dtype:
    dtypes = set()
    for name, piece in layout.by_native.items():
        if (dtype := weights.dtypes[name]) not in _FLOATS:
            raise CheckpointError(f"{weights.folder} has {name} as {dtype}; quantized weights cannot be converted.")
        # The correction bias is a buffer, float32 in a model of any dtype.
        if not piece.moe_name.endswith("e_score_correction_bias"):
            dtypes.add(dtype)
    return reduce(torch.promote_types, dtypes)
