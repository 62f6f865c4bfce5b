"""What it takes to say a `moe_hf` model in the words of another architecture, and back.

A configuration is translated from the other architecture into ours field by field. The way back fills the other's
fields, translates the result into ours again and compares: whatever did not survive has no counterpart there. So a
field that `MoEConfig` gets later is refused by every architecture that has not learned it.
"""

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ...configuration_moe import MoEConfig
from ...errors import ConfigError
from ..export import expected_tensors
from .function import function_of, make_config, one_sentence
from .tensors import Piece, TensorMap, expert_pieces

logger = logging.get_logger(__name__)

# What is called the same, and means the same, everywhere.
COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rope_parameters",
    "attention_dropout",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)

# Theirs that change nothing, or that `attention_window` looks at together.
_NOT_COMPARED = {field.name for field in fields(PreTrainedConfig)} | {
    "model_type",
    "transformers_version",
    "pretraining_tp",
    "head_dim",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
}


class Architecture:
    """A table of what one architecture of Transformers calls things, with code only where a table cannot say it."""

    model_type: ClassVar[str]
    is_sparse: ClassVar[bool] = True
    # Whether `head_dim` may be something else than `hidden_size / num_attention_heads`.
    has_head_dim: ClassVar[bool] = True
    # Whether RoPE may turn only a part of each head's channels.
    rotates_part: ClassVar[bool] = False
    # Theirs to ours, besides what all share.
    carried: ClassVar[Mapping[str, str]] = {}
    # Ours that one cannot choose there. What neither is carried nor fixed has the default of `MoEConfig`.
    fixed: ClassVar[Mapping[str, Any]] = {}
    # Theirs that ours has not, at the value that changes nothing.
    neutral: ClassVar[Mapping[str, Any]] = {}
    # Theirs that `moe_values` reads, or that concern something else than the model's output.
    other_fields: ClassVar[tuple[str, ...]] = ()
    # Ours to theirs in the names of tensors: of Transformers' modules, and of files where these differ from them.
    module_names: ClassVar[Mapping[str, str]] = {}
    file_names: ClassVar[Mapping[str, str] | None] = None
    expert_parts: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")

    def moe_values(self, native: PreTrainedConfig) -> dict[str, Any]:
        """Return those of our fields that no table gives; raise `ConfigError` for what ours cannot say."""
        return {}

    def native_values(self, config: MoEConfig) -> dict[str, Any]:
        """Return those of their fields that no table gives; raise `ConfigError` for what theirs cannot say."""
        return {}

    def left_out(self, native: PreTrainedConfig) -> list[str]:
        """Return patterns of tensors in their files that the model itself does without."""
        return []

    def to_moe_config(self, native: PreTrainedConfig) -> MoEConfig:
        """Translate their configuration into ours.

        Raises:
            ConfigError: it says something that ours cannot say, or contradicts itself.
        """
        self._check_understood(native)
        values = {name: copy.deepcopy(getattr(native, name)) for name in COMMON_FIELDS}
        values |= {ours: getattr(native, theirs) for theirs, ours in self.carried.items()}
        # Transformers' models read it even where their configurations do not declare it.
        values["head_dim"] = getattr(native, "head_dim", None)
        return make_config(values | dict(self.fixed) | self.moe_values(native))

    def to_native_config(self, config: MoEConfig) -> PreTrainedConfig:
        """Translate our configuration into theirs.

        Raises:
            ConfigError: a feature of the model has no counterpart there; the sentence names it.
        """
        if self.is_sparse != bool(config.num_sparse_layers):
            raise self.no_counterpart("num_experts", config.num_experts, "at least 1" if self.is_sparse else "0")
        values = {name: copy.deepcopy(getattr(config, name)) for name in COMMON_FIELDS}
        values |= {theirs: getattr(config, ours) for theirs, ours in self.carried.items()}
        values |= {"head_dim": config.head_dim} if self.has_head_dim else {}
        values |= dict(self.neutral) | self.native_values(config)
        share = values["rope_parameters"].pop("partial_rotary_factor", 1.0)
        if self.rotates_part:
            values["rope_parameters"]["partial_rotary_factor"] = share
        elif share != 1.0:
            raise self.no_counterpart("partial_rotary_factor", share, "1.0")
        for name in ("attention_dropout", "initializer_range", "rms_norm_eps"):
            values[name] = float(values[name])
        try:
            native = CONFIG_MAPPING[self.model_type](**values)
            meant = self.to_moe_config(native)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise ConfigError(
                f"The model has no counterpart in {self.model_type}, export to moe_hf instead: {one_sentence(error)}"
            ) from None
        there = function_of(meant)
        for name, value in function_of(config).items():
            if there.get(name) != value:
                raise self.no_counterpart(name, value, repr(getattr(meant, name)))
        native.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]]
        return native

    def no_counterpart(self, name: str, value: Any, needed: str) -> ConfigError:
        """Return the error for a field of ours that they cannot express, with the values that they can."""
        return ConfigError(
            f"{name}={value!r} has no counterpart in {self.model_type}, where it must be {needed}; "
            "export to moe_hf instead."
        )

    def not_understood(self, name: str, value: Any, needed: str) -> ConfigError:
        """Return the error for a field of theirs that ours cannot express, with the values that it can."""
        return ConfigError(
            f"{name}={value!r} of this {self.model_type} model has no counterpart in moe_hf; it must be {needed}."
        )

    def _check_understood(self, native: PreTrainedConfig) -> None:
        """Refuse a field of theirs that changes what is computed in a way that ours cannot."""
        known = {*COMMON_FIELDS, *self.carried, *self.other_fields, *_NOT_COMPARED}
        declared = {field.name: field.default for field in fields(native)}
        # A field that a later Transformers declares says nothing new as long as it has its default.
        for name, harmless in (declared | dict(self.neutral)).items():
            if name not in known and (value := getattr(native, name, harmless)) != harmless:
                raise self.not_understood(name, value, repr(harmless))
        if getattr(native, "quantization_config", None):
            raise self.not_understood("quantization_config", native.quantization_config, "left away")
        if (window := attention_window(native)) is not None:
            longest = native.max_position_embeddings
            raise self.not_understood("sliding_window", window, f"at least max_position_embeddings={longest}, or None")
        share = native.rope_parameters.get("partial_rotary_factor", 1.0)
        if share != 1.0 and not self.rotates_part:
            raise self.not_understood("partial_rotary_factor", share, "1.0")
        known |= {*declared, *self.neutral, *native.attribute_map, *native.attribute_map.values(), *dir(type(native))}
        if unread := sorted(name for name in vars(native).keys() - known if not name.startswith("_")):
            logger.warning_once(f"Left out, because {self.model_type} does not read it: {', '.join(unread)}.")

    def tensors(self, config: MoEConfig, dtype: torch.dtype = torch.float32, *, fused: bool = False) -> TensorMap:
        """Return the map between our tensors and those of their files.

        Args:
            config: of the model, ours.
            dtype: of its parameters.
            fused: by the names of Transformers' modules, where all experts of a layer are one tensor as ours are.
        """
        expected = self.expected_tensors(config, dtype)
        names = self.module_names if fused or self.file_names is None else self.file_names
        pieces: list[Piece] = []
        for moe_name, tensor in expected.items():
            native_name = moe_name
            for ours, theirs in names.items():
                native_name = native_name.replace(ours, theirs)
            if tensor.dim() == 3 and not fused:
                prefix = native_name.removesuffix("gate_up_proj").removesuffix("down_proj")
                pieces += expert_pieces(moe_name, prefix, self.expert_parts, tensor)
            else:
                pieces.append(Piece(native_name, moe_name))
        return TensorMap(pieces, expected)

    def expected_tensors(self, config: MoEConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return our tensors of which theirs consist, on the meta device."""
        return expected_tensors(config, dtype)

    def native_tensors(self, config: MoEConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return every tensor of their files, on the meta device, by its name."""
        return self.tensors(config, dtype).native_tensors()


def attention_window(native: PreTrainedConfig) -> int | None:
    """Return how far a token can look back, where that is less than the longest sequence."""
    window = getattr(native, "sliding_window", None)
    if not window or getattr(native, "use_sliding_window", True) is False:
        return None
    if (types := getattr(native, "layer_types", None)) is not None and "sliding_attention" not in types:
        return None
    return window if window < native.max_position_embeddings else None
