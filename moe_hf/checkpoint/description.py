"""What is in a model folder, told from its config.json and the headers of its safetensors; no weight is read."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..configuration_moe import MoEConfig
from ..errors import CheckpointError
from .export import expected_tensors
from .weights import SafetensorsFolder

# Reading a file of these kinds can execute what it holds; they are listed and never opened.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

_TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelSize:
    """The size of a model: parameters in all and used for one token, layers in all and sparse ones, experts."""

    parameters: int
    active_parameters: int
    layers: int
    sparse_layers: int
    experts: int
    experts_per_token: int


@dataclass
class ModelDescription:
    """What a model folder holds; `problems` are sentences, and without one it is whole.

    Where the architecture is not known here, `size` is `None` and the names are not checked.
    """

    kind: ClassVar[str] = "model"

    path: Path
    format: str
    model_type: str
    size: ModelSize | None = None
    weight_files: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    names_checked: bool = False
    has_tokenizer: bool = False
    pickles: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def tensors_by_dtype(self) -> dict[str, int]:
        """Return how many tensors there are of each dtype, by its name in PyTorch."""
        return dict(Counter(map(dtype_name, self.dtypes.values())))

    def as_json(self, tensors: bool = False) -> dict:
        """Return plain values, as `moe-hf inspect --json` documents them; `tensors` adds a table of them."""
        listed = {
            name: {"dtype": dtype_name(self.dtypes[name]), "shape": list(self.shapes[name])} for name in self.shapes
        }
        return {
            "kind": self.kind,
            "path": str(self.path),
            "whole": not self.problems,
            "problems": self.problems,
            "format": self.format,
            "model_type": self.model_type,
            "size": self.size and asdict(self.size),
            "weight_files": self.weight_files,
            "bytes": sum(self.weight_files.values()),
            "tensors_by_dtype": self.tensors_by_dtype,
            "names_checked": self.names_checked,
            "tokenizer": self.has_tokenizer,
            "pickles": self.pickles,
        } | ({"tensors": listed} if tensors else {})


def dtype_name(dtype: torch.dtype) -> str:
    """Return such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a model folder, of moe_hf or of Transformers; no code of the folder is run.

    Raises:
        CheckpointError: there is no config.json, it is damaged or contradicts itself, or nobody here knows its model.
    """
    model_type = read_model_type(folder)
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{folder} is a {model_type!r} model, which neither moe_hf nor Transformers {transformers.__version__} "
            "knows; code that a folder brings is not run."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each class of Transformers checks in its own way
        what = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder / 'config.json'} is not a {model_type} configuration: {what}") from None
    # A folder may ask for a kernel of the hub here, which is code.
    config._attn_implementation = config._experts_implementation = None
    return config


def read_model_type(folder: Path) -> str:
    """Return the `model_type` of a folder's config.json, or raise `CheckpointError`."""
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds a PEFT adapter; merge it into its model (merge_and_unload) and save that."
        )
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a model folder, it has no config.json; give OUTPUT_DIR/hf of a run.")
    try:
        model_type = json.loads(path.read_text())["model_type"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged or names no model_type; copy the folder again.") from None
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path} has model_type={model_type!r}, which is no name; copy the folder again.")
    return model_type


def describe_model(folder: Path) -> ModelDescription:
    """Describe a model folder and compare its tensors with those that its configuration means.

    Raises:
        CheckpointError: it is no model folder at all. What it lacks becomes `problems` instead.
    """
    folder = Path(folder)
    model_type = read_model_type(folder)
    description = ModelDescription(
        folder, "moe_hf" if model_type == MoEConfig.model_type else "transformers", model_type
    )
    files = sorted(path for path in folder.iterdir() if path.is_file())
    description.weight_files = {path.name: path.stat().st_size for path in files if path.suffix == ".safetensors"}
    description.pickles = [path.name for path in files if path.suffix in PICKLE_SUFFIXES]
    description.has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_NAMES)
    try:
        weights = SafetensorsFolder(folder)
        description.shapes, description.dtypes = weights.shapes, weights.dtypes
    except CheckpointError as error:
        description.problems.append(str(error))
    if model_type in CONFIG_MAPPING:
        try:
            config = read_config(folder)
            if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
                _compare(description, config)
        except CheckpointError as error:
            description.problems.append(str(error))
    return description


def size_of(config: PreTrainedConfig) -> ModelSize:
    """Count the parameters of a causal language model of this configuration; tied ones count once."""
    return _count(_on_meta(config))


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _count(model: PreTrainedModel) -> ModelSize:
    config = model.config.get_text_config()
    parameters = model.named_parameters(remove_duplicate=False)
    sizes = {name: parameter.numel() for name, parameter in parameters if name not in model.all_tied_weights_keys}
    routed = {name: size for name, size in sizes.items() if ".experts." in name}
    total, in_experts = sum(sizes.values()), sum(routed.values())
    experts = _first_of(config, "num_experts", "num_local_experts", "n_routed_experts") if routed else 0
    per_token = _first_of(config, "num_experts_per_tok", "num_experts_per_token") if routed else 0
    return ModelSize(
        parameters=total,
        active_parameters=total - in_experts + (in_experts * per_token // experts if routed else 0),
        layers=config.num_hidden_layers,
        sparse_layers=len({re.search(r"\.(\d+)\.", name)[1] for name in routed}),
        experts=experts,
        experts_per_token=per_token,
    )


def _first_of(config: PreTrainedConfig, *names: str) -> int:
    return next(value for name in names if isinstance(value := getattr(config, name, None), int))


def _compare(description: ModelDescription, config: PreTrainedConfig) -> None:
    """Add the architecture, and a problem for each difference between the files and what the configuration means."""
    model = _on_meta(config)
    description.size = _count(model)
    if getattr(config, "quantization_config", None) is not None or not description.shapes:
        return
    description.names_checked = True
    # What the hub's files of an architecture are called, or what its class calls them: both load.
    forms = [_shapes(form) for form in _forms(model)]
    expected = max(forms, key=lambda form: len(form.keys() & description.shapes.keys()))
    may_be_there = {*model.all_tied_weights_keys, *_old_buffers(model, description.shapes)}
    found = {name: shape for name, shape in description.shapes.items() if name not in may_be_there}
    required = {name: shape for name, shape in expected.items() if name not in may_be_there}
    description.problems += _differences(description.path, required, found)


def _old_buffers(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return the names that Transformers skips when it loads: buffers of older versions, layers it does not build."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def _forms(model: PreTrainedModel) -> list[Mapping[str, torch.Tensor]]:
    if isinstance(model.config, MoEConfig):
        return [expected_tensors(model.config)]
    own = model.state_dict()
    return [revert_weight_conversion(model, own), own]


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _differences(folder: Path, expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> list[str]:
    """Return one sentence for each kind of difference, naming the first tensors."""
    both = sorted(expected.keys() & found.keys())
    missing = sorted(expected.keys() - found.keys())
    wrong = [f"{name} {found[name]} instead of {expected[name]}" for name in both if found[name] != expected[name]]
    surplus = sorted(found.keys() - expected.keys())
    sentences = {
        f"{folder} is incomplete: {_some(missing)} missing.": missing,
        f"{folder} does not fit its config.json: {_some(wrong)} of another shape.": wrong,
        f"{folder} holds more than its config.json means: {_some(surplus)} left over.": surplus,
    }
    return [sentence for sentence, names in sentences.items() if names]


def _some(names: list[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}) are"
