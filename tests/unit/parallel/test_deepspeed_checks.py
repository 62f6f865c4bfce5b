"""Every shipped DeepSpeed JSON passes, and whatever contradicts the run is refused with its own sentence."""

import copy
from pathlib import Path

import pytest
from deepspeed_mistakes import config_with, refuses

from moe_hf import MoEConfig
from moe_hf.parallel import deepspeed_checks as checks
from moe_hf.parallel import deepspeed_config as dc
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


def check(changes: dict | None = None, **run) -> None:
    checks.check_deepspeed_config(config_with(changes), **(RUN | run))


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
