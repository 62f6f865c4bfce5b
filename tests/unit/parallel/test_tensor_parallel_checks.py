"""What tensor parallelism is refused with, each in one sentence that names what works."""

import re

import pytest
from small import deepspeed_json, small_config

from moe_hf.errors import ConfigError
from moe_hf.parallel import tensor_parallel_checks as checks
from moe_hf.parallel.parallel_sizes import with_parallel_sizes


def tensor_json(zero: int = 2, ep: int | None = 2, size: int = 2, **sections) -> dict:
    return deepspeed_json(zero, ep, **{"tensor_parallel": {"autotp_size": size}} | sections)


def with_zero(**options) -> dict:
    return {"zero_optimization": {"stage": options.pop("stage", 2), **options}}


def refuses(sentence: str):
    return pytest.raises(ConfigError, match=f"^{re.escape(sentence)}")


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("ep", [None, 2, 4])
def test_every_sharding_stage_passes(zero, ep):
    checks.check_tensor_parallel_json(tensor_json(zero, ep))
    checks.check_tensor_parallel_json(tensor_json(zero, ep, tensor_parallel={"autotp_size": 4, "tp": {"tp_size": 4}}))


def test_without_it_everything_else_is_free():
    config = deepspeed_json(0, 1, **with_zero(stage=0, offload_optimizer={"device": "cpu"}))
    checks.check_tensor_parallel_json(config)
    checks.check_tensor_parallel_json(with_parallel_sizes(config, pipeline=2))
    checks.check_tensor_parallel_model(config, small_config(qk_norm_scope="full", attention_dropout=0.1))
    checks.check_tensor_parallel_run(config, compiles=True, fp8=True, trains=False)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (tensor_json(ep=1), "expert_parallel_size=1 does not work with tensor_parallel_size=2; use 0"),
        (tensor_json(0, None), "zero_optimization.stage=0 does not work with tensor_parallel_size=2"),
        (
            tensor_json(use_data_before_expert_parallelism=True),
            "use_data_before_expert_parallelism=true does not work with tensor_parallel_size=2; delete it",
        ),
        (
            tensor_json(expert_parallel={"enabled": True, "autoep_size": 2, "expert_tensor_parallel_size": 2}),
            "expert_parallel.expert_tensor_parallel_size=2 is not possible: experts stay whole; use 1",
        ),
        (
            deepspeed_json(2, None, expert_parallel={"enabled": False, "expert_tensor_parallel_size": 4}),
            "expert_parallel.expert_tensor_parallel_size=4 is not possible",
        ),
        (
            tensor_json(**with_zero(offload_optimizer={"device": "cpu"})),
            'zero_optimization.offload_optimizer.device="cpu" does not work with tensor_parallel_size=2; delete',
        ),
        (
            tensor_json(3, None, **with_zero(stage=3, offload_param={"device": "nvme"})),
            'zero_optimization.offload_param.device="nvme" does not work with tensor_parallel_size=2; delete',
        ),
        (
            tensor_json(**with_zero(stage=3, zero_hpz_partition_size=2)),
            "zero_optimization.zero_hpz_partition_size=2 does not work with tensor_parallel_size=2; delete it",
        ),
        (
            tensor_json(**with_zero(stage=3, zero_quantized_weights=True)),
            "zero_optimization.zero_quantized_weights=true does not work with tensor_parallel_size=2; delete it",
        ),
        (
            tensor_json(1, data_types={"grad_accum_dtype": "fp32"}),
            'data_types.grad_accum_dtype="fp32" does not work with tensor_parallel_size=2 at ZeRO 1; use stage 2',
        ),
        (
            tensor_json(optimizer={"type": "Muon"}),
            'optimizer.type="Muon" needs whole matrices and does not work with tensor_parallel_size=2; use AdamW',
        ),
        (
            tensor_json(compile={"deepcompile": True}),
            "compile.deepcompile=true does not work with tensor_parallel_size=2; delete it",
        ),
        (
            tensor_json(tensor_parallel={"autotp_size": 2, "preset_model": "mixtral"}),
            'tensor_parallel.preset_model="mixtral" must be left out: moe_hf tells AutoTP what to cut of its models',
        ),
        (
            tensor_json(tensor_parallel={"tp": {"tp_size": 2}}),
            'tensor_parallel.tp={"tp_size": 2} must be left out: autotp_size says all',
        ),
        (tensor_json(tensor_parallel={"autotp_size": 0}), "tensor_parallel.autotp_size=0 must be a positive integer"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_settings_that_do_not_go_with_it_are_refused(config, sentence):
    with refuses(sentence):
        checks.check_tensor_parallel_json(config)


@pytest.mark.parametrize(
    ("changes", "size", "sentence"),
    [
        ({}, 4, "num_key_value_heads=2 cannot be split over tensor_parallel_size=4; use one of 1, 2"),
        (
            {"num_key_value_heads": 4, "intermediate_size": 50},
            4,
            "intermediate_size=50 cannot be split over tensor_parallel_size=4; use one of 1, 2",
        ),
        (
            {"num_key_value_heads": 4, "shared_expert_intermediate_size": 15},
            2,
            "shared_expert_intermediate_size=15 cannot be split over tensor_parallel_size=2; use one of 1",
        ),
        (
            {"qk_norm_scope": "full"},
            2,
            "qk_norm_scope='full' normalises over all heads, which tensor_parallel_size=2 would cut apart; use",
        ),
        (
            {"attention_dropout": 0.1},
            2,
            "attention_dropout=0.1 would drop the same of every rank's heads with tensor_parallel_size=2; use",
        ),
    ],
)
def test_models_that_cannot_be_cut_are_refused(changes, size, sentence):
    with refuses(sentence):
        checks.check_tensor_parallel_model(tensor_json(size=size), small_config(**changes))


def test_only_what_is_cut_must_be_divisible():
    config = tensor_json()
    checks.check_tensor_parallel_model(config, small_config(moe_intermediate_size=23, hidden_dropout=0.1))
    sparse = {"decoder_sparse_step": 1, "intermediate_size": 47, "moe_intermediate_size": 24}
    checks.check_tensor_parallel_model(config, small_config(**sparse))
    checks.check_tensor_parallel_model(config, small_config(qk_norm_scope="full", use_qk_norm=False))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"compiles": True}, "--torch_compile does not work with tensor_parallel_size=2; leave one of them away"),
        ({"fp8": True}, "--fp8 does not work with tensor_parallel_size=2; leave one of them away"),
        ({"trains": False}, "--do_eval without --do_train does not work with tensor_parallel_size=2; use tensor_"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(flags, sentence):
    usual = {"compiles": False, "fp8": False, "trains": True}
    checks.check_tensor_parallel_run(tensor_json(), **usual)
    with refuses(sentence):
        checks.check_tensor_parallel_run(tensor_json(), **usual | flags)
