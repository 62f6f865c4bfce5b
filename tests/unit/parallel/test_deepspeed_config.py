"""Every shipped DeepSpeed JSON passes, and every mistake is refused with its own sentence."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_hf import MoEConfig
from moe_hf.errors import ConfigError
from moe_hf.parallel import deepspeed_checks as checks
from moe_hf.parallel import deepspeed_config as dc
from moe_hf.parallel.deepspeed_schema import AUTO_KEYS, check_deepspeed_keys, check_deepspeed_values, deepspeed_schema
from moe_hf.parallel.offload import with_nvme_path
from moe_hf.presets import read_preset

FOLDER = Path(__file__).parents[3] / "ds_configs"
GENERAL = "zero1 zero1_pp zero2 zero2_ep zero2_tp_ep zero3 zero3_ep zero3_offload zero3_nvme zero3_ep_nvme"
SHIPPED = [FOLDER / f"{name}.json" for name in GENERAL.split()]
# They make other steps: distributed/test_precision.py runs them.
WITH_OPTIMIZERS = {"zero2_muon", "zero2_ep_cpu_adam"}
# Its ranks share rows: distributed/test_sequence_parallel.py runs it.
WITH_SHARED_ROWS = {"ulysses_zero2_ep"}

# A run that fits every shipped file: 4 ranks, 8 experts in each of 3 sparse layers.
RUN = {
    "world_size": 4,
    "num_experts": 8,
    "num_moe_layers": 3,
    "router_balancing": "aux_loss",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_grad_norm": 1.0,
    "bf16": True,
    "fp16": False,
    "learning_rate": 1e-4,
}


def config_with(changes: dict | None = None) -> dict:
    """A valid ZeRO-2 JSON with expert parallelism over 2 ranks, and dotted keys changed (None deletes)."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2},
        "expert_parallel": {"enabled": True, "autoep_size": 2},
    }
    for path, value in (changes or {}).items():
        *sections, key = path.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        if value is None:
            del node[key]
        else:
            node[key] = value
    return config


def check(changes: dict | None = None, **run) -> None:
    checks.check_deepspeed_config(config_with(changes), **(RUN | run))


def refuses(sentence: str):
    return pytest.raises(ConfigError, match=re.escape(sentence))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_pass_and_leave_the_argument_unchanged(path):
    config = dc.read_deepspeed_json(path)
    if path.stem.endswith("nvme"):
        config = with_nvme_path(config, "/local/disk")
    before = copy.deepcopy(config)
    checks.check_deepspeed_config(config, **RUN)
    checks.check_deepspeed_config(config, **(RUN | {"bf16": False, "world_size": 2, "max_grad_norm": 0.5}))
    assert config == before
    assert dc.expert_parallel_size(config) == (2 if "_ep" in path.stem else 0)
    assert f"zero{dc.zero_stage(config)}" == path.stem[:5]
    assert not {"optimizer", "scheduler"} & set(config)


OTHERS = WITH_OPTIMIZERS | WITH_SHARED_ROWS
RECIPES = sorted({path for path in FOLDER.glob("*.json") if path.stem not in OTHERS} - set(SHIPPED))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_files_of_recipes_fit_their_presets_on_sixteen_ranks(path):
    model = MoEConfig(**read_preset(path.stem))
    of_model = {"num_experts": model.num_experts, "num_moe_layers": model.num_sparse_layers}
    checks.check_deepspeed_config(dc.read_deepspeed_json(path), **(RUN | of_model | {"world_size": 16}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dc.read_deepspeed_json(FOLDER / "ulysses_zero2_ep.json"),
        {"expert_parallel": None},
        {"expert_parallel": {"enabled": False, "score_func": "sigmoid"}},
        {"expert_parallel.load_balance_coeff": 0, "expert_parallel.enabled": False},
        {"expert_parallel.preset_model": "moe_hf", "expert_parallel.score_apply": "post"},
        {"expert_parallel.combine_impl": "weighted_sum", "tensor_parallel.autotp_size": 1},
        {"tensor_parallel.autotp_size": 2, "train_batch_size": 12},
        {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
        {"train_batch_size": 24, "train_micro_batch_size_per_gpu": None},
        {"train_batch_size": 12, "sequence_parallel_size": 2},
        {"gradient_clipping": 1, "bf16.enabled": True, "fp16": None},
        {"gradient_clipping": None},
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1, "torch_adam": True}}},
        {"zero_optimization.reduce_bucket_size": 5e8, "zero_optimization.offload_optimizer": {"device": "cpu"}},
        {"zero_optimization.offload_param": {"device": "none"}, "steps_per_print": 10, "wandb": {"enabled": False}},
        {"zero_optimization.zero_quantized_gradients": True},
    ],
    ids=str,
)
def test_valid_configs_pass(changes):
    check(changes)


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


@pytest.mark.parametrize(
    ("changes", "run", "sentence"),
    [
        ({"zero_optimization": None}, {}, 'zero_optimization is missing; add "zero_optimization": {"stage": 1}'),
        ({"zero_optimization.stage": 4}, {}, "zero_optimization.stage=4 must be 0, 1, 2 or 3"),
        ({"zero_optimization.stage": "2"}, {}, 'zero_optimization.stage="2" must be 0, 1, 2 or 3'),
        ({"zero_optimization.stage": True}, {}, "zero_optimization.stage=true must be 0, 1, 2 or 3"),
        (
            {"zero_optimization.offload_param": {"device": "cpu"}},
            {},
            'offload_param.device="cpu" has no effect at ZeRO stage 2; use stage 3 or delete offload_param',
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            {},
            'offload_optimizer.device="cpu" has no effect at ZeRO stage 0; use stage 1, 2 or 3',
        ),
        ({"bfloat16": {"enabled": True}}, {}, "bfloat16 is an old name that the Trainer overrides; rename it to bf16"),
        ({"bf16": None}, {}, 'bf16.enabled is missing although --bf16 is set; add "bf16": {"enabled": "auto"}'),
        ({"fp16": {}}, {"fp16": True, "bf16": False}, "fp16.enabled is missing although --fp16 is set"),
        ({"bf16.enabled": True}, {"bf16": False}, 'bf16.enabled=true contradicts --bf16 False; write "auto" or false'),
        ({"bf16.enabled": False}, {}, 'bf16.enabled=false contradicts --bf16 True; write "auto" or true'),
        (
            {"fp16.enabled": True, "bf16": None, "zero_optimization.stage": 0, "expert_parallel": None},
            {"fp16": True, "bf16": False},
            "fp16.enabled=true at ZeRO stage 0: DeepSpeed divides gradients by a loss scale that it has not applied",
        ),
        ({"fp16.enabled": True}, {}, 'fp16.enabled=true contradicts --fp16 False; write "auto" or false'),
        ({}, {"fp16": True}, "bf16.enabled=true and fp16.enabled=true exclude each other"),
        ({"bf16.enabled": "on"}, {}, 'bf16.enabled="on" must be true, false or "auto"'),
        ({"bf16.check_grad_overflow": False}, {}, "bf16.check_grad_overflow=false lets NaN gradients into the weights"),
        (
            {"train_micro_batch_size_per_gpu": 4},
            {},
            'train_micro_batch_size_per_gpu=4 contradicts --per_device_train_batch_size 2; write "auto" or 2',
        ),
        (
            {"gradient_accumulation_steps": 4},
            {},
            'gradient_accumulation_steps=4 contradicts --gradient_accumulation_steps 3; write "auto" or 3',
        ),
        (
            {"train_batch_size": 25},
            {},
            "train_batch_size=25 contradicts --per_device_train_batch_size 2 x --gradient_accumulation_steps 3"
            ' x data_parallel_size 4 = 24; write "auto" or 24',
        ),
        ({"train_batch_size": {}}, {}, "train_batch_size={} contradicts"),
        (
            {"gradient_accumulation_steps": None},
            {},
            "gradient_accumulation_steps is missing, so that 1 would be used instead of 3",
        ),
        (
            {"train_batch_size": None, "train_micro_batch_size_per_gpu": None},
            {},
            "train_micro_batch_size_per_gpu is missing",
        ),
        ({"gradient_clipping": 0.5}, {}, 'gradient_clipping=0.5 contradicts --max_grad_norm 1.0; write "auto" or 1.0'),
        (
            {"gradient_clipping": None},
            {"max_grad_norm": None},
            'gradient_clipping is missing, so that 1.0 would be used instead of 0.0; add "gradient_clipping": "auto"',
        ),
        ({"optimizer": {"params": {}}}, {}, "optimizer.type is missing"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
            {},
            "optimizer.params.lr=0.1 contradicts --learning_rate 0.0001",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "scheduler must be left out; use the flags --lr_scheduler_type"),
        ({"managed_gradient_accumulation": False}, {}, "managed_gradient_accumulation=false does not work"),
        ({"gradient_allreduce_op": "sum"}, {}, 'gradient_allreduce_op="sum" scales the gradients'),
    ],
)
def test_contradictions_are_refused(changes, run, sentence):
    with refuses(sentence):
        check(changes, **run)


@pytest.mark.parametrize(
    ("changes", "run", "sentence"),
    [
        ({"expert_parallel": {"autoep_size": 2}}, {}, 'expert_parallel has no effect without "enabled": true'),
        ({"expert_parallel.enabled": "true"}, {}, 'expert_parallel.enabled="true" must be true or false'),
        ({"expert_parallel.autoep_size": 0}, {}, "expert_parallel.autoep_size=0 must be a positive integer"),
        ({"expert_parallel.autoep_size": "2"}, {}, 'expert_parallel.autoep_size="2" must be a positive integer'),
        ({}, {"num_experts": 0}, "expert_parallel_size=2 needs a model with experts, but this one has num_experts=0"),
        ({}, {"router_balancing": "expert_choice"}, "router_balancing='expert_choice' does not fit AutoEP"),
        ({}, {"num_moe_layers": 0}, "this one has num_experts=8 and 0 sparse layers; use expert_parallel_size=0"),
        (
            {"expert_parallel.autoep_size": 4},
            {"num_experts": 6, "world_size": 12},
            "num_experts=6 cannot be split over expert_parallel_size=4; use 1, 2, 3 or 6",
        ),
        (
            {"expert_parallel.autoep_size": 4},
            {"num_experts": 6},
            "num_experts=6 cannot be split over expert_parallel_size=4; use 1 or 2",
        ),
        ({"expert_parallel.autoep_size": 8}, {}, "expert_parallel_size=8 is larger than world_size=4; use 1, 2 or 4"),
        (
            {"expert_parallel.autoep_size": 4},
            {"world_size": 6},
            "world_size=6 is no multiple of expert_parallel_size=4; use 1 or 2",
        ),
        (
            {"expert_parallel.autoep_size": 3},
            {"world_size": 3, "num_experts": 4},
            "num_experts=4 cannot be split over expert_parallel_size=3; use 1",
        ),
        (
            {"expert_parallel.score_apply": "pre"},
            {},
            'expert_parallel.score_apply="pre" must be left out: routing is set in the model config',
        ),
        ({"expert_parallel.score_func": "sigmoid"}, {}, 'expert_parallel.score_func="sigmoid" must be left out'),
        ({"expert_parallel.load_balance_coeff": 0.1}, {}, "expert_parallel.load_balance_coeff=0.1 must be left out"),
        ({"expert_parallel.top_k": 2}, {}, "expert_parallel.top_k=2 must be left out: routing is set"),
        ({"expert_parallel.route_norm": True}, {}, "expert_parallel.route_norm=true must be left out: routing is set"),
        (
            {"expert_parallel.moe_layer_pattern": "mlp"},
            {},
            'expert_parallel.moe_layer_pattern="mlp" must be left out: the preset "moe_hf" describes the model',
        ),
        ({"expert_parallel.preset_model": "mixtral"}, {}, 'expert_parallel.preset_model="mixtral" must be left out'),
        (
            {"tensor_parallel": {"autotp_size": 3}},
            {},
            "world_size=4 is no multiple of tensor_parallel_size=3; start a multiple of 3 ranks",
        ),
        ({"tensor_parallel": {"tp": {"tp_size": 2}}}, {}, 'tensor_parallel.tp={"tp_size": 2} must be left out'),
        (
            {"sequence_parallel_size": 3},
            {},
            "world_size=4 is no multiple of sequence_parallel_size=3; start",
        ),
        (
            {"sequence_parallel_size": 2, "train_batch_size": 24},
            {},
            "train_batch_size=24 contradicts --per_device_train_batch_size 2 x --gradient_accumulation_steps 3"
            ' x data_parallel_size 2 = 12; write "auto" or 12',
        ),
        (
            {"sequence_parallel_size": 2, "pipeline": {"stages": 2}},
            {},
            "sequence_parallel_size=2 and pipeline_parallel_size=2 do not combine, because DeepSpeed has no groups",
        ),
        ({"pipeline": {"stages": 3}}, {}, "is no multiple of pipeline_parallel_size=3; start a multiple of 3 ranks"),
        (
            {"pipeline": {"stages": 2}, "expert_parallel.autoep_size": 4},
            {"world_size": 4},
            "expert_parallel_size=4 is larger than world_size / pipeline_parallel_size=2; use 1 or 2",
        ),
        (
            {"expert_parallel.expert_tensor_parallel_size": 2},
            {},
            "expert_parallel.expert_tensor_parallel_size=2 is not possible",
        ),
        (
            {"zero_optimization.stage": 0},
            {},
            "zero_optimization.stage=0 clips wrongly with expert parallelism; use ZeRO 1, 2 or 3",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            {},
            "zero_optimization.zero_quantized_gradients=true does not work at ZeRO 3 with expert parallelism",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            {},
            "zero_optimization.zero_hpz_partition_size=2 does not work at ZeRO 3 with expert parallelism",
        ),
        (
            {"expert_parallel.comm_backend": "nccl"},
            {},
            "expert_parallel is not accepted by DeepSpeed: comm_backend must be one of",
        ),
    ],
)
def test_expert_parallel_mistakes_are_refused(changes, run, sentence):
    with refuses(sentence):
        check(changes, **run)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1,\n "b": }', "is not JSON in line 2: Expecting value"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', 'key "stage" stands twice in one object'),
        ("[1, 2]", 'must hold an object {"key": value, ...}, not [1, 2]'),
        ('{"gradient_clipping": NaN}', "NaN is not a JSON number"),
        ("", "is not JSON in line 1"),
    ],
)
def test_broken_files_are_refused(tmp_path, text, sentence):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with refuses(sentence) as caught:
        dc.read_deepspeed_json(str(path))
    assert "ds.json" in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files_are_refused(tmp_path):
    with refuses("absent.json cannot be read: No such file or directory"):
        dc.read_deepspeed_json(tmp_path / "absent.json")
    with refuses("cannot be read: Is a directory"):
        dc.read_deepspeed_json(tmp_path)
    (tmp_path / "latin1.json").write_bytes(b'{"a": "\xe9"}')
    with refuses("latin1.json is not UTF-8 text"):
        dc.read_deepspeed_json(tmp_path / "latin1.json")


def test_reading_a_dict_copies_it_deeply():
    config = config_with()
    copied = dc.read_deepspeed_json(config)
    copied["zero_optimization"]["stage"] = 3
    assert config == config_with()


def test_expert_parallel_size_replaces_the_one_of_the_file():
    config = config_with({"expert_parallel.use_grouped_mm": False})
    larger = dc.with_expert_parallel_size(config, 4)
    assert larger["expert_parallel"] == {"enabled": True, "autoep_size": 4, "use_grouped_mm": False}
    off = dc.with_expert_parallel_size(config, 0)
    assert off["expert_parallel"] == {"enabled": False, "use_grouped_mm": False}
    assert config == config_with({"expert_parallel.use_grouped_mm": False})
    assert dc.with_expert_parallel_size({}, 1) == {"expert_parallel": {"enabled": True, "autoep_size": 1}}
    for wrong in (-1, 2.0, True, "2"):
        with refuses(f"expert_parallel_size={json.dumps(wrong)} must be an integer of at least 0"):
            dc.with_expert_parallel_size(config, wrong)


@pytest.mark.parametrize(
    ("section", "enabled", "size"),
    [
        ({}, False, 0),
        ({"enabled": False, "autoep_size": 2}, False, 0),
        ({"autoep_size": 2}, False, 0),  # DeepSpeed's default is off, whatever the size says
        ({"enabled": True}, True, 1),
        ({"enabled": True, "autoep_size": 4}, True, 4),
    ],
)
def test_getters_tell_size_one_from_disabled(section, enabled, size):
    config = {"expert_parallel": section}
    assert (dc.autoep_enabled(config), dc.expert_parallel_size(config), dc.zero_stage(config)) == (enabled, size, 0)


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
