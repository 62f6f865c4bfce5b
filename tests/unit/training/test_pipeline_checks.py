"""What a pipeline cannot do is refused by name, with what can be done instead; micro-batches are counted once."""

import pytest
from small import deepspeed_json, small_config

from moe_hf.errors import ConfigError
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.parallel_arguments import check_deepspeed_is_there, with_flags
from moe_hf.training.pipeline_checks import check_pipeline


def namespace(*words: str):
    return parse_arguments(["--output_dir", "out", "--do_train", "True", *words])


def pipeline_json(stages: int = 2, zero: int = 1, **sections) -> dict:
    pipeline = {"stages": stages} | sections.pop("pipeline", {})
    return deepspeed_json(zero, None, **sections) | {"pipeline": pipeline}


def test_what_works_passes():
    for words in ([], ["--bf16", "True"], ["--gradient_checkpointing", "True"]):
        check_pipeline(pipeline_json(), small_config(), namespace(*words))
    for stages in (1, 3, 4):
        check_pipeline(pipeline_json(stages), small_config(), namespace())
    check_pipeline(pipeline_json(pipeline={"partition": "uniform"}), small_config(), namespace())


def test_one_stage_is_no_pipeline():
    check_pipeline(pipeline_json(1, zero=3), small_config(), namespace("--torch_compile", "True"))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            pipeline_json(5),
            "pipeline_parallel_size=5 is more than num_hidden_layers=4, and a stage without a layer has nothing to do; "
            "use at most 4.",
        ),
        (pipeline_json(zero=2), "pipeline_parallel_size=2 does not go with zero_optimization.stage=2: .* use stage 1."),
        (pipeline_json(zero=3), "does not go with zero_optimization.stage=3: .* use stage 1."),
        (pipeline_json(zero=0), "at zero_optimization.stage=0 would clip each stage by its own gradient norm; use"),
        (
            pipeline_json(zero_optimization={"stage": 1, "offload_optimizer": {"device": "cpu"}}),
            'zero_optimization.offload_optimizer.device="cpu", which is untested there; delete offload_optimizer',
        ),
        (pipeline_json(pipeline={"partition": "type:x"}), 'pipeline.partition="type:x" must be "uniform" or "param'),
        (
            pipeline_json(pipeline={"activation_checkpoint_interval": 1}),
            "pipeline.activation_checkpoint_interval=1 must be 0; --gradient_checkpointing True does it",
        ),
        (
            pipeline_json(optimizer={"type": "Muon"}),
            "does not go with optimizer.type=Muon, which is untested",
        ),
        (
            pipeline_json(data_types={"grad_accum_dtype": "fp32"}),
            'data_types.grad_accum_dtype="fp32", untested there',
        ),
        (pipeline_json(pipeline={"seed_layers": True}), "pipeline.seed_layers=true would draw noise anew"),
    ],
)
def test_json_is_refused(config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_pipeline(config, small_config(), namespace())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--fp16", "True"], "pipeline_parallel_size=2 does not go with --fp16; use --bf16 True."),
        (["--fp8", "True"], "does not go with --fp8; use --bf16 True alone."),
        (["--torch_compile", "True"], "does not go with --torch_compile; use no --torch_compile."),
        (["--streaming", "True"], "does not go with --streaming; use shards of `moe-hf tokenize`"),
        (["--freeze_router", "True"], "does not go with --freeze_router; use no --freeze_router."),
        (["--router_learning_rate_multiplier", "2"], "does not go with --router_learning_rate_multiplier; use 1."),
        (["--router_weight_decay", "0"], "does not go with --router_weight_decay; use --weight_decay for all."),
        (
            ["--include_num_input_tokens_seen", "True"],
            "--include_num_input_tokens_seen; use num_tokens, which every log",
        ),
        (["--train_sampling_strategy", "batch_rebalance"], "--train_sampling_strategy batch_rebalance; use random or"),
        (
            ["--auto_find_batch_size", "True"],
            "go with --auto_find_batch_size; use --per_device_train_batch_size",
        ),
        (["--load_best_model_at_end", "True"], "does not go with --load_best_model_at_end; use the checkpoint"),
        (["--average_tokens_across_devices", "False"], "needs --average_tokens_across_devices True, which counts"),
    ],
)
def test_flag_is_refused(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_pipeline(pipeline_json(), small_config(), namespace(*words))


def test_expert_parallelism_needs_a_sparse_layer_on_every_stage():
    """Layers 1 and 3 are sparse."""
    experts = {"expert_parallel": {"enabled": True, "autoep_size": 1}}
    check_pipeline(pipeline_json(2, **experts), small_config(), namespace())
    sentence = (
        "pipeline_parallel_size=4 with expert parallelism needs a sparse layer on every stage, but stage 0 has layers "
        "0 to 0, which are dense; use fewer stages or --expert_parallel_size 0."
    )
    with pytest.raises(ConfigError, match=sentence):
        check_pipeline(pipeline_json(4, **experts), small_config(), namespace())


def test_micro_batches_are_accumulated_steps():
    flags = namespace("--num_microbatches", "6", "--pipeline_parallel_size", "4")
    config = with_flags(deepspeed_json(1, None, gradient_accumulation_steps=3), flags)
    assert config["gradient_accumulation_steps"] == flags.gradient_accumulation_steps == 6
    assert config["pipeline"] == {"stages": 4}


def test_the_same_number_may_be_said_twice():
    flags = namespace("--num_microbatches", "6", "--gradient_accumulation_steps", "6")
    assert with_flags(pipeline_json(), flags)["gradient_accumulation_steps"] == 6


@pytest.mark.parametrize(
    ("words", "config", "sentence"),
    [
        (["6"], deepspeed_json(1, None), "--num_microbatches 6 needs a pipeline; add --pipeline_parallel_size, or use"),
        (["0"], pipeline_json(), "num_microbatches=0 must be at least 1."),
        (
            ["6", "--gradient_accumulation_steps", "4"],
            pipeline_json(),
            "--num_microbatches 6 contradicts --gradient_accumulation_steps 4, which is the same for a pipeline; give",
        ),
    ],
)
def test_micro_batches_are_refused(words, config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        with_flags(config, namespace("--num_microbatches", *words))


def test_micro_batches_need_deepspeed():
    with pytest.raises(ConfigError, match="--num_microbatches 1 needs a pipeline; use --gradient_accumulation_steps 1"):
        check_deepspeed_is_there(namespace("--num_microbatches", "1"))
