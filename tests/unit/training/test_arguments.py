"""Flags and argument files: what is read, what overrides what, and the sentence for every mistake."""

import json
from argparse import Namespace
from dataclasses import dataclass

import pytest
import torch
from transformers.trainer_utils import SaveStrategy

from moe_hf.data.arguments import DataArguments
from moe_hf.errors import ConfigError
from moe_hf.training.arguments import (
    ModelArguments,
    MoETrainingArguments,
    build_parser,
    construct,
    parse_arguments,
)

YAML_IS_NOT_CHECKED = "values of a file that are not text do not pass through the parser"


@pytest.fixture
def write(tmp_path):
    """Return a function that writes an argument file and returns its path."""

    def write_file(content: str | dict, name: str = "arguments.yaml") -> str:
        path = tmp_path / name
        path.write_text(json.dumps(content) if isinstance(content, dict) else content)
        return str(path)

    return write_file


def training_arguments(*words: str) -> MoETrainingArguments:
    return construct(MoETrainingArguments, parse_arguments(["--use_cpu", *words]))


# --------------------------------------------------------------------------------------------------------------------
# Flags


def test_flags_reach_all_three_dataclasses():
    words = "--num_experts 16 --block_size 64 --expert_parallel_size 2 --learning_rate 1e-4 --bf16 --do_train"
    namespace = parse_arguments(words.split())
    assert construct(ModelArguments, namespace).num_experts == 16
    assert construct(DataArguments, namespace).block_size == 64
    args = construct(MoETrainingArguments, namespace)
    assert (args.expert_parallel_size, args.learning_rate, args.bf16, args.do_train) == (2, 1e-4, True, True)


def test_defaults_hide_nothing():
    namespace = parse_arguments([])
    args = construct(MoETrainingArguments, namespace)
    assert not args.logging_nan_inf_filter
    assert (args.logging_steps, args.max_skipped_steps, args.max_shard_size) == (10, 10, "5GB")
    assert args.optim == "adamw_torch_fused"  # a third of the time of torch's own default
    assert not args.overwrite_output_dir and args.expert_parallel_size is None
    assert construct(ModelArguments, namespace) == ModelArguments()


def test_word_of_the_launcher_stands_before_the_users(write):
    path = write("max_steps: 3\n")
    namespace = parse_arguments(["--local_rank=1", path, "--num_experts", "4"])
    assert (namespace.max_steps, namespace.num_experts) == (3, 4)


def test_every_flag_has_its_help():
    text = build_parser("what it is for").format_help()
    assert text.count("what it is for") == 1
    for flag in ("--config_overrides", "--train_file", "--expert_parallel_size", "--learning_rate"):
        assert flag in text
    own = ("num_experts", "attn_implementation", "max_skipped_steps", "packing", "overwrite_output_dir")
    actions = {action.dest: action.help for action in build_parser()._actions}
    assert all(actions[name] for name in own)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--num_expert", "4"], "--num_expert is not an argument of run_clm_moe.py; did you mean --num_experts?"),
        (["--learning_rat=1"], "--learning_rat is not an argument of run_clm_moe.py; did you mean --learning_rate?"),
        (["--qqqqqq"], "--qqqqqq is not an argument of run_clm_moe.py; see --help for all."),
        (["--max_steps", "3", "4"], "'4' is not preceded by a flag; see --help."),
        (["--max_steps", "ten"], "Argument --max_steps/--max-steps: invalid int value: 'ten'; see --help."),
        (["--max_steps"], "Argument --max_steps/--max-steps: expected one argument; see --help."),
        (
            ["--lr_scheduler_kwargs", "{a: 1}"],
            "--lr_scheduler_kwargs {a: 1} is not a JSON object; write it like '{\"key\": true}'.",
        ),
        (["--lr_scheduler_kwargs", "[1]"], "--lr_scheduler_kwargs [1] is not a JSON object; write it like"),
    ],
)
def test_wrong_flags_are_refused_with_a_sentence(words, sentence):
    with pytest.raises(ConfigError) as error:
        parse_arguments(words)
    assert str(error.value).startswith(sentence)


def test_a_flag_is_not_known_by_its_beginning():
    with pytest.raises(ConfigError, match="--overwrite_output is not an argument"):
        parse_arguments(["--overwrite_output"])


def test_several_reporters_on_the_command_line():
    words = ["--report_to", "wandb", "tensorboard", "--max_steps", "3"]
    assert parse_arguments(words).report_to == ["wandb", "tensorboard"]


@pytest.mark.parametrize(("word", "expected"), [("none", []), ("wandb", ["wandb"])])
def test_one_reporter_on_the_command_line(word, expected):
    assert training_arguments("--report_to", word).report_to == expected
    assert training_arguments().report_to == []


# --------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("extension", ["yaml", "yml", "json"])
def test_file_is_read_and_flags_after_it_override(write, extension):
    values = {"max_steps": 3, "learning_rate": "1e-4", "bf16": True, "num_experts": 4, "packing": "pad"}
    text = json.dumps(values) if extension == "json" else "".join(f"{key}: {value}\n" for key, value in values.items())
    namespace = parse_arguments([write(text, f"arguments.{extension}"), "--max_steps", "5", "--bf16", "false"])
    args, model_args = construct(MoETrainingArguments, namespace), construct(ModelArguments, namespace)
    assert (args.max_steps, args.learning_rate, args.bf16) == (5, 1e-4, False)
    assert (model_args.num_experts, construct(DataArguments, namespace).packing) == (4, "pad")


def test_file_holds_what_a_command_line_cannot(write):
    path = write(
        "report_to: [wandb, tensorboard]\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs:\n  min_lr: 1\n"
    )
    args = construct(MoETrainingArguments, parse_arguments([path, "--use_cpu"]))
    assert args.report_to == ["wandb", "tensorboard"]
    assert args.lr_scheduler_kwargs == {"min_lr": 1}


def test_a_data_file_after_a_flag_is_not_an_argument_file(write):
    path = write({"input_ids": [1]}, "rows.json")
    assert parse_arguments(["--train_file", path]).train_file == path


@pytest.mark.parametrize(
    ("content", "name", "sentence"),
    [
        (
            "learning_rat: 1\n",
            "a.yaml",
            "learning_rat is not an argument of run_clm_moe.py; did you mean learning_rate?",
        ),
        ("- max_steps\n", "a.yaml", "must hold one mapping of argument names to values, not a list."),
        ("", "a.yml", "must hold one mapping of argument names to values, not a NoneType."),
        ("max_steps: [1", "a.yaml", "a.yaml is not valid: while parsing a flow sequence"),
        ('{"max_steps": 1,}', "a.json", "a.json is not valid: "),
        ("max_steps: ten\n", "a.yaml", "Argument --max_steps/--max-steps: invalid int value: 'ten'; see --help."),
    ],
)
def test_wrong_files_are_refused_with_a_sentence(write, content, name, sentence):
    with pytest.raises(ConfigError) as error:
        parse_arguments([write(content, name)])
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read the arguments in .*none\.yaml: No such file or directory"):
        parse_arguments([str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    "line",
    [
        "max_steps: 3.5",
        "max_steps: true",
        "learning_rate: true",
        "per_device_train_batch_size: [4]",
        "train_file: [a.txt, b.txt]",
        "do_train: 3",
        "3: max_steps",
    ],
)
def test_values_of_the_wrong_type_are_refused(write, line):
    with pytest.raises(ConfigError, match=line.partition(":")[0]):
        parse_arguments([write(line + "\n")])


def test_numbers_inside_a_mapping_are_numbers(write):
    path = write("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}\n")
    assert construct(MoETrainingArguments, parse_arguments([path])).lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_values_are_what_the_flags_would_give(write):
    """A folder may be called 2024, YAML reads `no` as false, and `true` is a word of resume_from_checkpoint."""
    path = write("output_dir: 2024\nsave_strategy: no\nresume_from_checkpoint: true\nadam_beta1: 0\n")
    args = construct(MoETrainingArguments, parse_arguments([path, "--use_cpu"]))
    assert (args.output_dir, args.save_strategy) == ("2024", SaveStrategy.NO)
    assert args.resume_from_checkpoint.lower() == "true"
    assert isinstance(args.adam_beta1, float)


# --------------------------------------------------------------------------------------------------------------------
# Construction


def test_contradictions_of_training_arguments_become_a_config_error():
    with pytest.raises(ConfigError, match="load_best_model_at_end requires the save and eval strategy to match"):
        training_arguments("--load_best_model_at_end")


def test_a_missing_package_becomes_a_config_error():
    @dataclass
    class Arguments:
        def __post_init__(self) -> None:
            raise ImportError("needs 'package', which is not installed")

    with pytest.raises(ConfigError, match="needs 'package', which is not installed"):
        construct(Arguments, Namespace())


def test_values_can_be_replaced():
    args = construct(MoETrainingArguments, parse_arguments(["--resume_from_checkpoint", "true"]), max_steps=7)
    assert (args.max_steps, args.resume_from_checkpoint) == (7, "true")


@pytest.mark.parametrize("size", ["5G", "4000", "0.5 GiB", "1PB", "many"])
def test_shard_size_that_an_export_could_not_use_is_refused(size):
    with pytest.raises(ConfigError, match="max_shard_size"):
        training_arguments("--max_shard_size", size)


@pytest.mark.parametrize("size", ["5GB", "500MB", "1.5 GB", "20kb"])
def test_shard_sizes_of_transformers_are_taken(size):
    assert training_arguments("--max_shard_size", size).max_shard_size == size


@pytest.mark.skipif(torch.accelerator.is_available(), reason="says what happens without an accelerator")
def test_without_an_accelerator_the_cpu_is_chosen():
    assert construct(MoETrainingArguments, parse_arguments([])).use_cpu


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_reentrant_checkpointing_is_refused(name):
    if name not in MoETrainingArguments.__dataclass_fields__:
        pytest.skip(f"this version of Transformers has no {name}")
    words = [f"--{name}", "true", f"--{name}_kwargs"]
    with pytest.raises(ConfigError, match="would switch the router losses off; it must have use_reentrant=False"):
        training_arguments(*words, '{"use_reentrant": true}')
    with pytest.raises(ConfigError, match="must have use_reentrant=False"):
        # Torch takes reentrant ones where it is not told.
        training_arguments(*words, '{"preserve_rng_state": true}')
    with pytest.raises(ConfigError, match="would let recomputation draw other noise"):
        training_arguments(*words, '{"use_reentrant": false, "preserve_rng_state": false}')
    assert training_arguments(*words, '{"use_reentrant": false}')
