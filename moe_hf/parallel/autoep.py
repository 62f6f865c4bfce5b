"""Put our router into DeepSpeed's expert-parallel layer.

AutoEP finds the sparse blocks of a model by a preset, replaces each by an `AutoEPMoELayer` that holds only this rank's
experts, and routes with a router of its own that knows neither our losses nor our methods. DeepSpeed has no public
registration, so this module adds a preset for `model_type = "moe_hf"` to its registry, with an adapter whose last hook
exchanges the router again: after all layers are replaced, before ZeRO and the optimizer are built.
"""

import logging
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim import Optimizer

from ..configuration_moe import MoEConfig
from ..routing import MoERouter
from .versions import require_supported

require_supported("deepspeed")
require_supported("transformers")

from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer  # noqa: E402
from deepspeed.module_inject.auto_ep_presets import registry  # noqa: E402
from deepspeed.module_inject.auto_ep_presets.base import AutoEPPresetAdapter, MoEModelPreset  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402

from .expert_parallel_layer import ExpertParallelLayer  # noqa: E402

_PRESET_NAME = MoEConfig.model_type

# Elements of one rank's share of an expert group; DeepSpeed's own bound, which keeps flat buffers addressable.
_MAX_GROUP_SIZE = 178_956_971

_PRESET = MoEModelPreset(
    moe_layer_pattern=r"model\.layers\.\d+\.mlp",
    router_pattern="gate",
    experts_pattern="experts",
    expert_storage="fused_3d",
    expert_w1="gate_up_proj",
    expert_w2="down_proj",
    expert_w3=None,
    num_experts_attr="num_experts",
    top_k_attr="num_experts_per_tok",
    score_func="softmax",
    score_apply="post",
    route_norm=True,
    gate_bias=False,
    has_shared_experts=True,
    shared_experts_pattern="shared_experts",
    shared_experts_gate_pattern="shared_experts_gate",
    preset_adapter=_PRESET_NAME,
    hf_model_types=(_PRESET_NAME,),
)


class _RouterAdapter(AutoEPPresetAdapter):
    """Hooks that AutoEP calls while it converts a `moe_hf` model."""

    def validate_compatibility(self, preset_name, preset, model_config) -> None:
        super().validate_compatibility(preset_name, preset, model_config)
        # The first hook: from here to the last one, AutoEP warns that it ignores losses that our router computes.
        deepspeed_logger.addFilter(_is_about_something_else)

    def retarget_transformers_output_recorders(
        self, model, spec, replacement, retargeted_keys, remove_output_capture_hooks
    ) -> None:
        deepspeed_logger.removeFilter(_is_about_something_else)
        for _, layer in autoep_layers(model):
            _install_router(layer, model.config)
            ExpertParallelLayer.take_over(layer)
        # Hooks of an earlier forward sit on the replaced routers; Transformers puts them back at the next one.
        remove_output_capture_hooks(model)
        for module in model.modules():
            if getattr(module, "_output_capturing_hooks_installed", False):
                module._output_capturing_hooks_installed = False


def _is_about_something_else(record: logging.LogRecord) -> bool:
    return "AutoEP router does not implement" not in record.getMessage()


def _install_router(layer: AutoEPMoELayer, config: MoEConfig) -> None:
    """Replace the layer's router by ours, keeping the Parameter object: optimizer and ZeRO know it by identity."""
    if isinstance(layer.router, MoERouter):
        return
    weight = layer.router.gate.weight
    with torch.device("meta"):
        router = MoERouter(config)
    router.weight = weight
    # AutoEP has copied the bias to its own router; the layer's `expert_bias`, added besides, is another one.
    router.e_score_correction_bias = layer.router.e_score_correction_bias
    router.train(layer.training)
    layer.router = router


def register_preset() -> None:
    """Teach AutoEP about `moe_hf` models. Calling it again changes nothing."""
    registry.PRESET_MODELS[_PRESET_NAME] = _PRESET
    registry._PRESET_ADAPTERS[_PRESET_NAME] = _RouterAdapter()


def split_expert_groups(optimizer: Optimizer, model: nn.Module, ep_size: int) -> None:
    """Move the experts of `model` into parameter groups of their own, as ZeRO demands of an expert-parallel model.

    Call it before `deepspeed.initialize`, which exchanges the parameters inside the groups for each rank's share.

    Args:
        optimizer: fresh, without state; every group is split, so that its settings are kept.
        model: not yet converted.
        ep_size: ranks that share one set of experts.
    """
    experts = {id(p) for name, p in model.named_parameters() if ".mlp.experts." in name}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in experts]
        group["params"] = [p for p in group["params"] if id(p) not in experts]
        for params in _chunks(own, _MAX_GROUP_SIZE * ep_size):
            # DeepSpeed recognises such a group by `moe` and finds its process group by `name`.
            optimizer.param_groups.append({**group, "params": params, "moe": True, "name": f"ep_size_{ep_size}"})


def _chunks(params: list[nn.Parameter], max_elements: int) -> Iterator[list[nn.Parameter]]:
    chunk, size = [], 0
    for param in params:
        count = getattr(param, "ds_numel", param.numel())
        if chunk and size + count > max_elements:
            yield chunk
            chunk, size = [], 0
        chunk.append(param)
        size += count
    if chunk:
        yield chunk


def autoep_layers(model: nn.Module) -> Iterator[tuple[str, AutoEPMoELayer]]:
    """Yield name and module of every layer that AutoEP has converted."""
    for name, module in model.named_modules():
        if isinstance(module, AutoEPMoELayer):
            yield name, module
