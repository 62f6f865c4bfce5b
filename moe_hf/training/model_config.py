"""From a preset, a file or a folder, plus overrides, to one validated `MoEConfig`."""

import difflib
import json
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import yaml

from ..checkpoint.architectures.function import make_config
from ..checkpoint.export import expected_tensors
from ..checkpoint.source import local_folder, open_model, read_config, read_native_config
from ..configuration_moe import MoEConfig
from ..errors import CheckpointError, ConfigError
from ..presets import preset_names, read_preset
from ..yaml_values import parse_yaml
from .argument_files import EXTENSIONS
from .arguments import ModelArguments

# Ways to say which layers are sparse; the fields of one group belong together.
_LAYER_PATTERNS = ({"mlp_layer_types"}, {"moe_layer_indices"}, {"decoder_sparse_step", "first_k_dense_replace"})
_OWN_FLAGS = (
    "num_experts",
    "num_experts_per_tok",
    "decoder_sparse_step",
    "hidden_size",
    "num_hidden_layers",
    "router_aux_loss_coef",
    "router_z_loss_coef",
)


def build_config(model_args: ModelArguments) -> MoEConfig:
    """Return the configuration that the arguments describe, validated once after all overrides.

    Raises:
        ConfigError: unknown preset, unreadable file, unknown field, or settings that contradict each other.
    """
    source = model_args.model_name_or_path or model_args.config_name
    if source is None:
        raise ConfigError(
            "Neither --config_name nor --model_name_or_path is given; "
            f"name a preset ({', '.join(preset_names())}), a configuration file or a folder with weights."
        )
    if model_args.model_name_or_path and model_args.config_name:
        raise ConfigError("--config_name and --model_name_or_path both name a configuration; give one of them.")
    values = _read_folder(source) if model_args.model_name_or_path else _read_config(source)
    overrides = parse_overrides(model_args.config_overrides or "")
    for name in _OWN_FLAGS:
        if (value := getattr(model_args, name)) is not None:
            overrides[name] = value
    return make_config(_merge(values, overrides))


def local_model(path_or_id: str) -> str:
    """Return the folder that `--model_name_or_path` names; a model of the hub is downloaded first."""
    with _named_by_the_flag():
        return str(local_folder(path_or_id))


def check_weights(folder: str, config: MoEConfig) -> None:
    """Refuse a folder unless its weights are those of the model: Transformers leaves what it misses at random.

    Args:
        folder: with a model of any known architecture, of whose weights only names and shapes are read.
        config: of the model that is to be loaded from it.

    Raises:
        ConfigError: a file is damaged, or a weight is missing, has another shape or belongs to another model.
    """
    with _named_by_the_flag():
        saved = {k: list(v.shape) for k, v in expected_tensors(open_model(folder).config).items()}
    wanted = {k: list(v.shape) for k, v in expected_tensors(config).items()}
    wrong = [f"{k} has shape {saved[k]} instead of {v}" for k, v in wanted.items() if saved.get(k, v) != v]
    # A bias that the router did not have begins at zero.
    wrong += [f"{k} is missing" for k in wanted if k not in saved and not k.endswith("e_score_correction_bias")]
    wrong += [f"{k} is not part of it" for k in saved if k not in wanted]
    if wrong:
        raise ConfigError(
            f"--model_name_or_path {folder} does not fit the model: {wrong[0]}; "
            "leave out the flags that change its configuration."
        )


@contextmanager
def _named_by_the_flag() -> Iterator[None]:
    """Let what is wrong with a folder, whose sentence begins with its name, begin with the flag."""
    try:
        yield
    except CheckpointError as error:
        raise ConfigError(f"--model_name_or_path {error}") from None


def parse_overrides(text: str) -> dict:
    """Parse `"num_experts=8,rope_theta=1e6,mlp_layer_types=[dense,sparse],head_dim=None"` by the fields' types.

    Raises:
        ConfigError: no `=`, an unknown field, or a value that its field's type cannot hold.
    """
    declared = {f.name: f.type for f in fields(MoEConfig)} | {"rope_theta": float}
    overrides = {}
    for item in _split_outside_brackets(text):
        name, equals, raw = (part.strip() for part in item.partition("="))
        if not equals:
            raise ConfigError(f"config_overrides: {item.strip()!r} is not of the form name=value.")
        if name not in declared:
            nearest = difflib.get_close_matches(name, sorted(declared), n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else "."
            raise ConfigError(f"config_overrides: {name} is not a field of MoEConfig{hint}")
        overrides[name] = _convert(name, raw, declared[name])
    return overrides


def _convert(name: str, raw: str, annotation) -> object:
    allowed = typing.get_args(annotation) or (annotation,)
    if raw == "None":
        value = None
    else:
        try:
            value = parse_yaml(raw)
        except yaml.YAMLError:
            value = raw
    if isinstance(value, str) and float in allowed:
        # YAML reads 1e-3 as text.
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"config_overrides: {name}={raw} is not a number.") from None
    return value


def _split_outside_brackets(text: str) -> list[str]:
    items, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            items.append(text[start:position])
            start = position + 1
    return [item for item in [*items, text[start:]] if item.strip()]


def _merge(values: dict, overrides: dict) -> dict:
    """Apply overrides; a list of layer types that was derived from its shorthand is derived again."""
    if touched := [group for group in _LAYER_PATTERNS if group & overrides.keys()]:
        # One way to say which layers are sparse takes the place of the others.
        replaced = set().union(*_LAYER_PATTERNS) - set().union(*touched)
        values = {k: v for k, v in values.items() if k not in replaced}
    elif overrides.keys() & {"num_hidden_layers", "num_experts"} and "mlp_layer_types" in values:
        rest = {k: v for k, v in values.items() if k != "mlp_layer_types"}
        if make_config(rest).mlp_layer_types == values["mlp_layer_types"]:
            values = rest
    merged = values | overrides
    if "rope_theta" in overrides and isinstance(merged.get("rope_parameters"), dict):
        merged["rope_parameters"] = merged["rope_parameters"] | {"rope_theta": merged.pop("rope_theta")}
    return merged


def _read_config(source: str) -> dict:
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix not in EXTENSIONS:
        return read_preset(source)
    try:
        values = json.loads(path.read_text()) if path.suffix == ".json" else parse_yaml(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"--config_name {source}: there is no such file.") from None
    except (OSError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config_name {source} cannot be read: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config_name {source} must hold one mapping of MoEConfig's fields.")
    if (model_type := values.get("model_type", MoEConfig.model_type)) != MoEConfig.model_type:
        raise ConfigError(f"{source} describes a {model_type!r} model, not a {MoEConfig.model_type!r} one.")
    if "num_local_experts" in values and "num_experts" not in values:
        # One name from here on, so that a flag can override it.
        values["num_experts"] = values.pop("num_local_experts")
    return {k: v for k, v in values.items() if k not in ("model_type", "auto_map", "transformers_version")}


def _read_folder(source: str) -> dict:
    with _named_by_the_flag():
        folder = local_folder(source)
        if read_native_config(folder)[1] is None:
            return _read_config(str(folder))
        config = read_config(folder)
    return {name: getattr(config, name) for name in MoEConfig.__annotations__}
