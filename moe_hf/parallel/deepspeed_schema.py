"""Check a DeepSpeed JSON against DeepSpeed itself: which keys it reads and which values it takes.

DeepSpeed refuses an unknown key only inside the sections that it parses with pydantic. Everywhere else it looks up the
keys it knows and never sees the others, so that a misspelt `expert_paralel` trains without expert parallelism and
without a word. The schema here is not a copy of DeepSpeed's documentation but is asked from the installed DeepSpeed:
from the fields of its pydantic models, from those of its AutoEP dataclass, and for the rest from a dict that notes
which keys DeepSpeed's own parser looks up in it. A key that a newer DeepSpeed learns is therefore known here too.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

from moe_hf.errors import ConfigError

# Known keys of one section; None marks a plain value or a section whose inside is the user's own.
Schema = dict[str, "Schema | None"]

# `deepspeed.initialize` reads these two before it builds the config object that the recording dict is given to.
_READ_BEFORE_CONFIG = ("data_parallel_size", "sequence_parallel_size")

# PipelineEngine looks this key up by itself; the other keys of its section have a default in the config parser.
_READ_BY_PIPELINE_ENGINE = "use_reentrant"

# Names that are used elsewhere for the same thing, too far from DeepSpeed's own for a spelling distance to find.
_OTHER_NAMES = {
    "batch_size": "train_batch_size",
    "ep_size": "expert_parallel.autoep_size",
    "expert_parallel_size": "expert_parallel.autoep_size",
    "expert_model_parallel_size": "expert_parallel.autoep_size",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "moe": "expert_parallel",
    "zero": "zero_optimization",
}

# A key of more sections than this ("enabled") says nothing about the section that was meant.
_MOST_PLACES = 3

# Where "auto" is replaced: by the Trainer from its flags and the model's hidden_size (transformers/integrations/
# deepspeed.py), and for the last key by Accelerate. Accelerate would also accept "auto" as ZeRO stage or offload
# device, but takes those from environment variables and not from anything the user wrote, so they are not listed.
AUTO_KEYS = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16.enabled",
        "fp16.enabled",
        "optimizer.params.lr",
        "optimizer.params.betas",
        "optimizer.params.eps",
        "optimizer.params.weight_decay",
        "scheduler.params.warmup_min_lr",
        "scheduler.params.warmup_max_lr",
        "scheduler.params.warmup_num_steps",
        "scheduler.params.total_num_steps",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    }
)


@functools.lru_cache(maxsize=1)
def deepspeed_schema() -> Schema:
    """Return every key that the installed DeepSpeed reads from its JSON, as nested dicts (not to be modified)."""
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig
    from deepspeed.runtime import config as runtime_config
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    schema = _recorded_schema()
    schema.update(dict.fromkeys(_READ_BEFORE_CONFIG))
    for section, model in _section_models().items():
        schema[section] = _model_schema(model)
    schema["expert_parallel"] = {
        field.name: None for field in dataclasses.fields(AutoEPConfig) if field.init and field.name[0] != "_"
    }
    schema["pipeline"] = dict.fromkeys([*runtime_config.get_pipeline_config({}), _READ_BY_PIPELINE_ENGINE])
    schema["timers"] = {"throughput": _model_schema(DeepSpeedThroughputTimerConfig)}
    return schema


def check_deepspeed_keys(config: dict[str, Any]) -> None:
    """Refuse every key that DeepSpeed would ignore and every "auto" that nothing fills in.

    Args:
        config (`dict`): the whole DeepSpeed JSON.

    Raises:
        ConfigError: if a key is unknown, stands in the wrong section or was removed from DeepSpeed, if a section is
            not an object, or if "auto" stands where the Trainer does not replace it.
    """
    for section, schema, values in _walk(config, deepspeed_schema()):
        for key, value in values.items():
            path = _join(section, key)
            if schema is not None and key not in schema:
                raise ConfigError(_unknown_key_sentence(section, key))
            if schema is not None and schema[key] is not None and not isinstance(value, dict):
                raise ConfigError(f'{path}={as_json(value)} must be an object like "{key}": {{...}} or be left out')
            if value == "auto" and path not in AUTO_KEYS:
                raise ConfigError(f'{path}="auto" is filled in by nobody; write a value or delete the key')


def check_deepspeed_values(config: dict[str, Any]) -> None:
    """Let DeepSpeed's own pydantic models judge the values of their sections, before any rank builds an engine.

    Args:
        config (`dict`): a DeepSpeed JSON whose keys have passed `check_deepspeed_keys`.

    Raises:
        ConfigError: with the first value that a model does not take, and its reason.
    """
    from pydantic import ValidationError

    for section, model in _section_models().items():
        if section not in config:
            continue
        try:
            model(**config[section])
        except ValidationError as error:
            raise ConfigError(_invalid_value_sentence(section, error.errors()[0])) from None
        except AssertionError as error:  # an old and a new name of one option, checked after the validation
            raise ConfigError(f"{section}: {error}") from None


def as_json(value: Any) -> str:
    """Write a value the way it stands in the JSON file, so that the user finds it there."""
    return json.dumps(value, default=str)


class _LookupRecorder(dict):
    """A dict that notes every key looked up in it, present or not."""

    def __init__(self, items: dict[str, Any] | None = None):
        super().__init__(items or {})
        self.looked_up: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.looked_up.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.looked_up.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.looked_up.add(key)
        return super().get(key, default)

    def keys(self) -> _LookupRecorder:  # type: ignore[override]  # `KEY in config.keys()` is a lookup as well
        return self

    def schema(self) -> Schema:
        nested = {key: value.schema() for key, value in self.items() if isinstance(value, _LookupRecorder)}
        return {key: nested.get(key) for key in self.looked_up}


def _recorded_schema() -> Schema:
    """Watch DeepSpeed parse a config whose hand-parsed sections are recorders too."""
    from deepspeed.runtime import config as runtime_config

    plain = ("activation_checkpointing", "aio", "data_types", "flops_profiler", "torch_autocast")
    recorder = _LookupRecorder({section: _LookupRecorder() for section in plain})
    recorder["autotuning"] = _LookupRecorder({"model_info": _LookupRecorder()})
    recorder["checkpoint"] = _LookupRecorder({"writer": _LookupRecorder(), "parallel_write": _LookupRecorder()})
    for section in ("optimizer", "scheduler"):  # `params` is looked up only beside a type
        recorder[section] = _LookupRecorder({"type": "any"})
    recorder["train_micro_batch_size_per_gpu"] = 1  # without a batch size the parser stops
    runtime_config.DeepSpeedConfig(recorder)
    # The parser also looks for what it no longer supports, in order to refuse it.
    return {key: value for key, value in recorder.schema().items() if key not in _removed_keys()}


def _section_models() -> dict[str, type]:
    """Map each section to the pydantic model with which DeepSpeed parses it."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime import config as runtime_config
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    monitors = {name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()}
    return monitors | {
        "bf16": DeepSpeedBF16Config,
        "bfloat16": DeepSpeedBF16Config,  # the old name, still read when there is no "bf16"
        "comms_logger": CommsLoggerConfig,
        "compile": runtime_config.CompileConfig,
        "fp16": DeepSpeedFP16Config,
        "hybrid_engine": runtime_config.HybridEngineConfig,
        "tensor_parallel": TPTrainingConfig,
        "weight_quantization": runtime_config.WeightQuantConfig,
        "zero_optimization": DeepSpeedZeroConfig,
    }


def _model_schema(model: type) -> Schema:
    schema: Schema = {}
    for name, field in model.model_fields.items():
        nested = _nested_model(field.annotation)
        for key in (name, field.alias or name):  # DeepSpeed's models take a field by its name and by its alias
            schema[key] = _model_schema(nested) if nested else None
    return schema


def _nested_model(annotation: Any) -> type | None:
    """Return the pydantic model of a field of type `Model` or `Optional[Model]`, else None."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        annotation = members[0] if len(members) == 1 else None
    return annotation if isinstance(annotation, type) and hasattr(annotation, "model_fields") else None


def _removed_keys() -> dict[str, str]:
    from deepspeed.runtime import config as runtime_config

    top_level = getattr(runtime_config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    in_zero = getattr(runtime_config, "_REMOVED_ZERO_CONFIG_KEYS", {})
    return top_level | {f"zero_optimization.{key}": message for key, message in in_zero.items()}


def _walk(
    values: dict[str, Any], schema: Schema | None, section: str = ""
) -> Iterator[tuple[str, Schema | None, dict[str, Any]]]:
    """Yield (dotted name, schema or None, values) of a section and all sections in it."""
    yield section, schema, values
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _walk(value, (schema or {}).get(key), _join(section, key))


def _unknown_key_sentence(section: str, key: str) -> str:
    path = _join(section, key)
    places: dict[str, list[str]] = {}  # every known key and the sections that know it
    for place, schema in _sections(deepspeed_schema()):
        for known in schema if place != "bfloat16" else ():  # nobody is sent to the old name of "bf16"
            places.setdefault(known, []).append(place)
    if path in _removed_keys():
        return f"{path} is no longer supported by DeepSpeed; delete it"
    if 0 < len(places.get(key, ())) <= _MOST_PLACES:
        return f"{key} belongs {' or '.join(map(_place, places[key]))}, not {_place(section)}"
    if near := _nearest(section, key, places):
        return f"{path} is not a DeepSpeed key; did you mean {near}?"
    return f"{path} is not a DeepSpeed key and would be ignored; delete it"


def _nearest(section: str, key: str, places: dict[str, list[str]]) -> str | None:
    """Return the dotted name of the key that was probably meant, first looking where the unknown one stands."""
    if key.lower() in _OTHER_NAMES:
        return _OTHER_NAMES[key.lower()]
    siblings = [known for known, homes in places.items() if section in homes]
    if near := difflib.get_close_matches(key.lower(), siblings, n=1, cutoff=0.8):
        return _join(section, near[0])
    elsewhere = [known for known, homes in places.items() if len(homes) <= _MOST_PLACES and known != key]
    if near := difflib.get_close_matches(key.lower(), elsewhere, n=1, cutoff=0.8):
        return " or ".join(_join(home, near[0]) for home in places[near[0]])
    return None


def _sections(schema: Schema, section: str = "") -> Iterator[tuple[str, Schema]]:
    yield section, schema
    for key, nested in schema.items():
        if nested is not None:
            yield from _sections(nested, _join(section, key))


def _place(section: str) -> str:
    return f"into {section}" if section else "at the top level"


def _join(section: str, key: Any) -> str:
    return f"{section}.{key}" if section else str(key)


def _invalid_value_sentence(section: str, error: dict[str, Any]) -> str:
    path = ".".join([section, *map(str, error["loc"])])
    value = f"={as_json(error['input'])}" if error["loc"] else ""  # no place: the section contradicts itself
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{path}{value} is not accepted by DeepSpeed: {reason}"
