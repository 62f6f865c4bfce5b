"""Refuse a DeepSpeed or Transformers whose integration points are not where this package expects them."""

import importlib
from importlib.metadata import version

from packaging.specifiers import SpecifierSet

SUPPORTED = {"deepspeed": SpecifierSet(">=0.19.8,<0.20"), "transformers": SpecifierSet(">=5.17,<6")}

# module -> names that must exist there; all private to their libraries
_INTEGRATION_POINTS = {
    "deepspeed": {
        "deepspeed.module_inject.auto_ep_layer": (
            "AutoEPMoELayer._finalize_output",
            "AutoEPMoELayer._forward",
            "_AllToAllV",
            "compute_split_plan",
        ),
        "deepspeed.module_inject.auto_ep_presets.base": ("AutoEPPresetAdapter", "MoEModelPreset"),
        "deepspeed.module_inject.auto_ep_presets.registry": ("PRESET_MODELS", "_PRESET_ADAPTERS"),
        "deepspeed.checkpoint.constants": ("DS_AUTOTP_UC_META",),
        "deepspeed.runtime.engine": ("DeepSpeedEngine._take_model_step", "DeepSpeedEngine.was_step_applied"),
        "deepspeed.runtime.pipe.engine": ("PipelineEngine.eval_batch", "PipelineEngine.train_batch"),
        "deepspeed.runtime.pipe.module": (
            "PipelineModule._build",
            "PipelineModule._partition_layers",
            "PipelineModule._set_bounds",
        ),
        "deepspeed.runtime.sequence_parallel.ulysses_sp": ("UlyssesSPAttentionHF",),
        "deepspeed.runtime.swap_tensor.partitioned_param_swapper": ("AsyncPartitionedParameterSwapper._configure_aio",),
        "deepspeed.runtime.zero.stage3": (
            "DeepSpeedZeroOptimizer_Stage3._configure_tensor_swapping",
            "DeepSpeedZeroOptimizer_Stage3._rigid_load_state_dict",
            "DeepSpeedZeroOptimizer_Stage3._rigid_state_dict",
            "DeepSpeedZeroOptimizer_Stage3.reset_swap_buffers",
        ),
        "deepspeed.runtime.zero.stage_1_and_2": ("DeepSpeedZeroOptimizer.get_grad_norm_direct",),
        "deepspeed.utils.groups": ("_get_data_parallel_group", "get_tensor_model_parallel_group"),
    },
    "transformers": {
        "transformers.utils.output_capturing": ("OutputRecorder", "capture_outputs"),
        "transformers.integrations.deepspeed": ("HfTrainerDeepSpeedConfig", "is_deepspeed_zero3_enabled"),
        "transformers.integrations": ("use_experts_implementation",),
        "transformers.integrations.sonicmoe": ("is_sonicmoe_loadable", "load_sonicmoe_kernel"),
        "transformers.integrations.moe": ("ALL_EXPERTS_FUNCTIONS", "_default_apply_gate"),
        "transformers.modeling_utils": (
            "PreTrainedModel._initialize_weights",
            "PreTrainedModel.get_correct_experts_implementation",
        ),
        "transformers.trainer": (
            "Trainer._load_best_model",
            "Trainer._load_from_checkpoint",
            "Trainer._load_rng_state",
            "Trainer._maybe_log_save_evaluate",
            "Trainer._prepare_for_training",
            "Trainer._save_checkpoint",
            "Trainer.get_batch_samples",
        ),
    },
}


def require_supported(package: str) -> None:
    """Raise `ImportError` with one sentence unless the installed `package` still has our integration points.

    The names decide, not the version: a later release that keeps them works, and is let in.
    """
    missing = []
    for module_name, names in _INTEGRATION_POINTS[package].items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            missing.append(module_name)
            continue
        missing += [f"{module_name}.{name}" for name in names if not _has(module, name)]
    if missing:
        raise ImportError(
            f"{package} {version(package)} has moved {missing[0]}, to which moe_hf attaches; "
            f"install a version that works: pip install '{package}{SUPPORTED[package]}'."
        )


def _has(module, dotted: str) -> bool:
    for name in dotted.split("."):
        module = getattr(module, name, None)
    return module is not None
