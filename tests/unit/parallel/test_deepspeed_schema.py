"""Every key and value of DeepSpeed passes, and every other one is refused with its own sentence."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from deepspeed_mistakes import refuses

from moe_hf.parallel import deepspeed_checks as checks
from moe_hf.parallel.deepspeed_schema import AUTO_KEYS, check_deepspeed_keys, check_deepspeed_values, deepspeed_schema


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"expert_paralel": {}}, "expert_paralel is not a DeepSpeed key; did you mean expert_parallel?"),
        ({"zero_optimisation": {}}, "zero_optimisation is not a DeepSpeed key; did you mean zero_optimization?"),
        ({"auto_ep_size": 2}, "auto_ep_size is not a DeepSpeed key; did you mean expert_parallel.autoep_size?"),
        ({"ep_size": 2}, "ep_size is not a DeepSpeed key; did you mean expert_parallel.autoep_size?"),
        ({"BF16": {}}, "BF16 is not a DeepSpeed key; did you mean bf16?"),
        ({"autoep_size": 2}, "autoep_size belongs into expert_parallel, not at the top level"),
        (
            {"zero_optimization": {"gradient_clipping": 1}},
            "gradient_clipping belongs at the top level, not into zero_optimization",
        ),
        ({"fp16": {"check_grad_overflow": True}}, "check_grad_overflow belongs into bf16, not into fp16"),
        (
            {"device": "cpu"},
            "device belongs into zero_optimization.offload_param or into zero_optimization.offload_optimizer, not at",
        ),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            "zero_optimization.offload_param.devise is not a DeepSpeed key; did you mean"
            " zero_optimization.offload_param.device?",
        ),
        ({"flops_profiler": {"modul_depth": 1}}, "did you mean flops_profiler.module_depth?"),
        ({"checkpoint": {"writer": {"typ": "fast"}}}, "did you mean checkpoint.writer.type?"),
        ({"timers": {"throughput": {"enable": True}}}, "did you mean timers.throughput.enabled?"),
        ({"enabled": True}, "enabled is not a DeepSpeed key and would be ignored; delete it"),
        ({"_comment": "mine"}, "_comment is not a DeepSpeed key and would be ignored; delete it"),
        ({"elasticity": {}}, "elasticity is no longer supported by DeepSpeed; delete it"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "zero_optimization.mics_shard_size is no longer supported"),
        ({"bf16": True}, 'bf16=true must be an object like "bf16": {...} or be left out'),
        ({"zero_optimization": {"offload_param": None}}, "zero_optimization.offload_param=null must be an object"),
        ({"expert_parallel": {"autoep_size": "auto"}}, 'expert_parallel.autoep_size="auto" is filled in by nobody'),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage="auto" is filled in by nobody'),
        ({"optimizer": {"params": {"momentum": "auto"}}}, 'optimizer.params.momentum="auto" is filled in by nobody'),
    ],
)
def test_unknown_keys_are_refused(config, sentence):
    with refuses(sentence):
        check_deepspeed_keys(config)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size=-1 is not accepted"),
        ({"zero_optimization": {"offload_param": {"device": "gpu"}}}, 'offload_param.device="gpu" is not accepted'),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            "zero_optimization is not accepted by DeepSpeed: compute",
        ),
        ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale=-1 is not accepted by DeepSpeed: fp16.loss_scale must be >= 0"),
        ({"wandb": {"enabled": "perhaps"}}, 'wandb.enabled="perhaps" is not accepted by DeepSpeed'),
        (
            {"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization: Cannot provide deprecated parameter 'cpu_offload'",
        ),
    ],
)
def test_values_are_judged_by_deepspeed(config, sentence):
    with refuses(sentence):
        check_deepspeed_values(config)


def test_every_field_of_deepspeeds_models_is_accepted():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}
    for section, model in models.items():
        for name, field in model.model_fields.items():
            for key in {name, field.alias or name}:
                value = {} if name in ("offload_param", "offload_optimizer", "zenflow", "leaf_module") else 1
                check_deepspeed_keys({section: {key: value}})


def test_every_autoep_option_is_accepted_as_a_key():
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig

    names = [field.name for field in dataclasses.fields(AutoEPConfig) if not field.name.startswith("_")]
    check_deepspeed_keys({"expert_parallel": dict.fromkeys(names)})
    # These and no others leave router and layers alone; whatever else AutoEP offers is refused by one of the patterns.
    harmless = [
        name for name in names if not checks._ROUTING_KEYS.fullmatch(name) and not checks._LAYOUT_KEYS.fullmatch(name)
    ]
    assert harmless == [
        "enabled",
        "autoep_size",
        "expert_tensor_parallel_size",
        "validate_folding_routing",
        "async_split_plan",
        "use_grouped_mm",
        "disable_triton_grouped_mm",
        "combine_impl",
        "row_weighting_impl",
        "gate_up_impl",
        "comm_backend",
        "comm_num_sm",
        "comm_qp_margin",
        "comm_max_tokens_per_rank",
    ]


def test_keys_that_deepspeed_parses_by_hand_are_known():
    # Written from DeepSpeed's documentation, so that a recording that misses a section is noticed.
    documented = {
        "train_batch_size steps_per_print wall_clock_breakdown dump_state prescale_gradients vocabulary_size": None,
        "communication_data_type memory_breakdown sequence_parallel_size zero_force_ds_cpu_optimizer": None,
        "optimizer": "type params legacy_fusion",
        "scheduler": "type params",
        "activation_checkpointing": "partition_activations cpu_checkpointing number_checkpoints profile",
        "flops_profiler": "enabled profile_step module_depth top_modules detailed output_file recompute_fwd_factor",
        "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
        "checkpoint": "tag_validation load_universal use_node_local_storage parallel_write writer",
        "data_types": "grad_accum_dtype",
        "comms_logger": "enabled verbose prof_all prof_ops debug",
        "tensorboard": "enabled output_path job_name",
        "csv_monitor": "enabled output_path job_name",
        "wandb": "enabled group team project",
        "torch_autocast": "enabled dtype lower_precision_safe_modules",
        "pipeline": "stages partition activation_checkpoint_interval use_reentrant",
    }
    schema = deepspeed_schema()
    for section, keys in documented.items():
        assert set((keys or section).split()) <= set(schema[section] if keys else schema)


def test_the_trainer_fills_every_auto_that_is_allowed():
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    filled_by_accelerate = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    keys = AUTO_KEYS - {filled_by_accelerate}
    config = {"zero_optimization": {"stage": 3}}
    for path in keys:
        *sections, key = path.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = "auto"
    check_deepspeed_keys(config)
    arguments = {"world_size": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    arguments |= {"max_grad_norm": 1.0, "learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.95}
    arguments |= {"adam_epsilon": 1e-8, "weight_decay": 0.1, "save_on_each_node": False, "bf16": True, "fp16": False}
    arguments |= {"bf16_full_eval": False, "fp16_full_eval": False, "get_warmup_steps": lambda steps: 0}
    try:
        filled = HfTrainerDeepSpeedConfig(config)
        filled.trainer_config_process(SimpleNamespace(**arguments))
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
        filled.trainer_config_finalize(SimpleNamespace(**arguments), model, num_training_steps=10)
    finally:
        unset_hf_deepspeed_config()
    assert '"auto"' not in json.dumps(filled.config)
