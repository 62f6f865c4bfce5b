"""Everything that a user can get wrong on a command line that trains, and what is said about it."""

from bad_input import FROM_FOLDER, MODEL, RESET_ALONE, TORN, Case, resuming, saved, with_data, with_json
from fork_server import Patch

COMMAND_LINE = [
    Case(
        "unknown_flag",
        {"num_expert": 4},
        "--num_expert is not an argument of run_clm_moe.py; did you mean --num_experts?",
    ),
    Case("word_without_flag", {}, "'train' is not preceded by a flag", words=("train",)),
    Case(
        "unknown_key_in_yaml",
        {},
        "learning_rat is not an argument of run_clm_moe.py; did you mean learning_rate?",
        words=("arguments.yaml",),
        files={"arguments.yaml": "learning_rat: 1e-4\n"},
    ),
    Case(
        "yaml_is_a_list",
        {},
        "arguments.yaml must hold one mapping of argument names to values, not a list",
        words=("arguments.yaml",),
        files={"arguments.yaml": "- learning_rate\n"},
    ),
    Case("yaml_not_found", {}, "Cannot read the arguments in arguments.yaml: No such file", words=("arguments.yaml",)),
    Case("not_a_number", {"learning_rate": "fast"}, "--learning-rate: invalid float value: 'fast'"),
    Case("not_a_choice", {"save_strategy": "sometimes"}, "invalid choice: 'sometimes' (choose from 'no', 'steps'"),
    Case("nothing_to_do", {"do_train": None}, "Nothing to do: give --do_train, --do_eval or both."),
    Case("save_on_each_node", {"save_on_each_node": True}, "--output_dir must be on a disk that all machines share"),
    Case("jit_checkpoint", {"enable_jit_checkpoint": True}, "--enable_jit_checkpoint is not needed: SIGTERM and"),
    Case("push_to_hub", {"push_to_hub": True}, "--push_to_hub does not say where to; add --hub_model_id"),
    Case(
        "reentrant_checkpointing",
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"use_reentrant": true}'},
        "would switch the router losses off; it must have use_reentrant=False",
    ),
    Case(
        "gradient_checkpointing_kwargs",
        {"gradient_checkpointing_kwargs": "{use_reentrant"},
        "--gradient_checkpointing_kwargs {use_reentrant is not a JSON object; write it like",
    ),
    Case(
        "refused_by_training_arguments",
        {"load_best_model_at_end": True, "save_strategy": "steps"},
        "load_best_model_at_end requires the save and eval strategy to match",
    ),
    Case("refused_by_trainer", {"report_to": "paper"}, "paper is not supported, only"),
]

MODELS = [
    Case("no_model", {"config_name": None}, "Neither --config_name nor --model_name_or_path is given; name a preset"),
    Case("two_models", {"model_name_or_path": "../common/model"}, "--config_name and --model_name_or_path both name"),
    Case(
        "unknown_preset",
        {"config_name": "quickstrat"},
        "--config_name quickstrat is neither a preset nor a .json or .yaml file; did you mean quickstart?",
    ),
    Case("config_not_found", {"config_name": "mine.json"}, "--config_name mine.json: there is no such file"),
    Case(
        "config_is_not_json",
        {"config_name": "mine.json"},
        "--config_name mine.json cannot be read: Expecting ',' delimiter: line 2 column 1",
        files={"mine.json": '{"vocab_size": 128\n"hidden_size": 32}'},
    ),
    Case(
        "unknown_key_in_json_config",
        {"config_name": "mine.json"},
        "num_expert=4 is not a field of MoEConfig; did you mean num_experts?",
        files={"mine.json": MODEL | {"num_expert": 4}},
    ),
    Case(
        "unknown_key_in_yaml_config",
        {"config_name": "mine.yaml"},
        "hiddensize=32 is not a field of MoEConfig; did you mean hidden_size?",
        files={"mine.yaml": "hiddensize: 32\n"},
    ),
    Case(
        "other_model_type",
        {"config_name": "config.json"},
        "describes a 'llama' model, not a 'moe_hf' one",
        files={"config.json": {"model_type": "llama", "hidden_size": 32}},
    ),
    Case(
        "too_many_experts_per_token",
        {"num_experts_per_tok": 8},
        "num_experts_per_tok=8 must be between 1 and num_experts=4",
    ),
    Case(
        "indivisible_hidden_size",
        {"hidden_size": 34},
        "hidden_size=34 is not divisible by num_attention_heads=4; change one",
    ),
    Case(
        "unknown_override",
        {"config_overrides": "head_dims=8"},
        "head_dims is not a field of MoEConfig; did you mean head_dim?",
    ),
    Case("override_not_a_number", {"config_overrides": "rms_norm_eps=tiny"}, "rms_norm_eps=tiny is not a number"),
    Case(
        "override_of_wrong_type",
        {"config_overrides": "num_hidden_layers=two"},
        "'num_hidden_layers' expected int, got str",
    ),
    Case("override_without_equals", {"config_overrides": "head_dim"}, "'head_dim' is not of the form name=value"),
    Case(
        "folder_not_found",
        FROM_FOLDER | {"model_name_or_path": "absent"},
        "--model_name_or_path absent is not a folder with a config.json and weights",
    ),
    Case(
        "folder_without_weights",
        FROM_FOLDER | {"model_name_or_path": "mine"},
        "--model_name_or_path mine holds no *.safetensors file",
        files={"mine/config.json": {"model_type": "moe_hf"} | MODEL},
    ),
    Case(
        "folder_with_torn_weights",
        FROM_FOLDER | {"model_name_or_path": "mine"},
        "model.safetensors is damaged",
        files={"mine/config.json": {"model_type": "moe_hf"} | MODEL, "mine/model.safetensors": "torn"},
    ),
    Case(
        "weights_of_other_width",
        FROM_FOLDER | {"hidden_size": 64},
        "does not fit the model: model.embed_tokens.weight has shape [128, 32] instead of [128, 64]",
    ),
    Case(
        "weights_of_fewer_layers",
        FROM_FOLDER | {"num_hidden_layers": 6},
        "does not fit the model: model.layers.4.self_attn.q_proj.weight is missing",
    ),
    Case("weights_of_more_layers", FROM_FOLDER | {"num_hidden_layers": 2}, "is not part of it; leave out the flags"),
    Case("unknown_attention", {"attn_implementation": "fancy"}, '`attn_implementation="fancy"` is not supported'),
]

DEEPSPEED = [
    Case("json_not_found", {"deepspeed": "ds.json"}, "DeepSpeed JSON ds.json cannot be read: No such file"),
    Case(
        "invalid_json",
        {"deepspeed": "ds.json"},
        "DeepSpeed JSON ds.json is not JSON in line 3",
        files={"ds.json": '{\n  "bf16": {"enabled": "auto"}\n  "fp16": {}\n}'},
    ),
    with_json("misspelt_section", "did you mean expert_parallel?", expert_paralel={"enabled": True}),
    with_json(
        "misspelt_key",
        "did you mean expert_parallel.autoep_size?",
        expert_parallel={"enabled": True, "auto_ep_size": 2},
    ),
    with_json(
        "british_zero", "did you mean zero_optimization?", zero_optimization=None, zero_optimisation={"stage": 2}
    ),
    with_json(
        "ep_indivisible_experts", "num_experts=3 cannot be split over expert_parallel_size=2; use 1", {"num_experts": 3}
    ),
    with_json(
        "sp_indivisible_heads",
        "sequence_parallel_size=2 cannot share num_attention_heads=3 and num_key_value_heads=1; use 1 or 3",
        {"config_overrides": "num_attention_heads=3,num_key_value_heads=1,head_dim=8", "sequence_parallel_size": 2},
    ),
    with_json(
        "sp_with_tp",
        "tensor_parallel_size=2 and sequence_parallel_size=2 do not combine, because DeepSpeed has no groups of ranks",
        sequence_parallel_size=2,
        tensor_parallel={"autotp_size": 2},
        ranks=4,
    ),
    with_json("ep_indivisible_world", "world_size=3 is no multiple of expert_parallel_size=2; use 1", ranks=3),
    with_json(
        "ep_larger_than_world", "expert_parallel_size=4 is larger than world_size=2", {"expert_parallel_size": 4}
    ),
    with_json("ep_of_dense_model", "expert_parallel_size=2 needs a model with experts", {"num_experts": 0}),
    with_json(
        "ep_at_stage_0",
        "zero_optimization.stage=0 clips wrongly with expert parallelism",
        zero_optimization={"stage": 0},
    ),
    with_json(
        "micro_batch_contradicts",
        "train_micro_batch_size_per_gpu=4 contradicts --per_device_train_batch_size 1",
        train_micro_batch_size_per_gpu=4,
    ),
    with_json("batch_contradicts", "train_batch_size=64 contradicts", train_batch_size=64),
    with_json("clipping_contradicts", "gradient_clipping=0.5 contradicts --max_grad_norm 1.0", gradient_clipping=0.5),
    with_json(
        "bf16_contradicts", 'bf16.enabled=true contradicts --bf16 False; write "auto" or false', bf16={"enabled": True}
    ),
    with_json("scheduler", "scheduler must be left out; use the flags", scheduler={"type": "WarmupLR"}),
    with_json(
        "evaluation_alone_at_stage_2",
        "--do_eval without --do_train needs ZeRO stage 3, not 2",
        {"do_train": None, "do_eval": True},
    ),
    Case(
        "ep_without_deepspeed",
        {"deepspeed": None, "expert_parallel_size": 2},
        "expert_parallel_size=2 needs DeepSpeed; add --deepspeed",
    ),
]

# With the terms that are added to the cross-entropy of the predictions.
SMOOTHED = {"label_smoothing_factor": 0.1, "config_overrides": "output_z_loss_coef=1e-3"}
LOSSES = [
    with_json(
        "smoothing_of_1_in_a_pipeline",
        "label_smoothing_factor=1.0 must be at least 0 and below 1; 0.1 is usual.",
        SMOOTHED | {"label_smoothing_factor": 1.0, "pipeline_parallel_size": 2},
        zero_optimization={"stage": 1},
        expert_parallel=None,
    ),
    with_json(
        "negative_z_loss_with_tp",
        "output_z_loss_coef=-0.001 must be a finite number that is not negative.",
        SMOOTHED | {"config_overrides": "output_z_loss_coef=-1e-3", "tensor_parallel_size": 2},
    ),
    with_json(
        "smoothing_in_a_pipeline_at_stage_3",
        "pipeline_parallel_size=2 does not go with zero_optimization.stage=3",
        SMOOTHED | {"pipeline_parallel_size": 2},
        zero_optimization={"stage": 3},
        expert_parallel=None,
    ),
    with_json(
        "smoothing_with_sp_and_means_of_ranks",
        "average_tokens_across_devices=False would weigh pieces of a sequence alike",
        SMOOTHED | {"sequence_parallel_size": 2, "average_tokens_across_devices": False},
    ),
    with_json(
        "smoothing_with_tp_and_pipeline",
        "tensor_parallel_size=2 and pipeline_parallel_size=2 do not combine, because DeepSpeed has no groups of ranks",
        SMOOTHED | {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        ranks=4,
        zero_optimization={"stage": 1},
    ),
]

DATA = [
    Case("file_not_found", {"train_file": "absent.jsonl"}, "train_file 'absent.jsonl' does not exist"),
    Case("glob_without_match", {"train_file": "absent/*.jsonl"}, "train_file 'absent/*.jsonl' matches no file"),
    with_data("empty_file", "train_file 'data.jsonl' is empty", ""),
    with_data(
        "unsupported_extension",
        "train_file 'data.docx' has an unsupported extension; use one of .txt",
        "w3",
        file="data.docx",
    ),
    Case(
        "mixed_extensions",
        {"train_file": "data.*"},
        "train_file 'data.*' mixes .csv and .jsonl files",
        files={"data.csv": "text\nw3\n", "data.jsonl": '{"text": "w3"}\n'},
    ),
    with_data(
        "missing_column",
        "text_column='body' is not in the training data, which has: text",
        '{"text": "w3"}\n',
        {"text_column": "body"},
    ),
    with_data("no_text_column", "the training data has no column 'text'; set text_column", '{"a": "w3", "b": "w4"}\n'),
    with_data(
        "invalid_json_line", "'data.jsonl', line 3: invalid JSON", '{"text": "w3"}\n{"text": "w4"}\n{"text": "w5"\n'
    ),
    with_data("not_utf8", "'data.jsonl', line 2: byte 0xe9 is not UTF-8", '{"text": "w3"}\n{"text": "caf\udce9"}\n'),
    with_data(
        "text_is_a_number", "row 1 of the training data ('data.jsonl'): column 'text' holds 3 (int)", '{"text": 3}\n'
    ),
    with_data(
        "text_is_null",
        "row 2 of the training data ('data.jsonl'): column 'text' holds null",
        '{"text": "w3"}\n{"text": null}\n',
    ),
    with_data(
        "token_beyond_vocabulary",
        "input_ids holds 128, which is not in the model's range of 0 to 127",
        '{"input_ids": [3, 128]}\n',
    ),
    with_data(
        "too_little_text",
        "holds 3 of the 16 tokens that one row needs; give more text or a smaller block_size",
        '{"text": "w3 w4"}\n',
    ),
    Case(
        "block_beyond_positions",
        {"block_size": 65},
        "block_size=65 is more than the model's max_position_embeddings=64",
    ),
    Case(
        "tokenizer_larger_than_model",
        {"config_overrides": "vocab_size=100"},
        "The tokenizer has 128 tokens but the model's vocab_size is 100; add --config_overrides vocab_size=128",
    ),
    Case("tokenizer_not_found", {"tokenizer_name": "./absent"}, "The tokenizer ./absent cannot be loaded"),
    Case("no_validation_data", {"do_eval": True}, "there is no validation data: give validation_file"),
]

CHECKPOINTS = [
    Case(
        "output_folder_in_use",
        {},
        "--output_dir out already holds checkpoint-3; give another folder",
        checkpoint=saved(),
    ),
    Case(
        "output_dir_is_a_file",
        {"output_dir": "mine.txt"},
        "--output_dir mine.txt is a file",
        files={"mine.txt": "dear"},
    ),
    # The earlier run must outlive a mistake that shows only after all flags were found to be well.
    Case(
        "bad_data_with_overwrite",
        {"overwrite_output_dir": True, "train_file": "data.jsonl"},
        "holds 2 of the 16 tokens",
        files={"data.jsonl": '{"text": "w3"}\n'},
        checkpoint=saved(),
    ),
    resuming("checkpoint_not_found", "There is no checkpoint at out/checkpoint-3", None),
    resuming(
        "no_last_checkpoint",
        "--resume_from_checkpoint true: there is no checkpoint-N in out to go on from; auto starts anew",
        None,
        {"resume_from_checkpoint": True},
    ),
    resuming(
        "checkpoint_without_record",
        "out/checkpoint-3 has no manifest.json, so it is not a whole checkpoint of run_clm_moe.py; there is no other",
        saved(spoil=lambda folder, state: (folder / "manifest.json").unlink()),
    ),
    resuming(
        "damaged_record",
        "out/checkpoint-3 is torn: manifest.json is damaged; there is no other whole checkpoint beside it",
        saved(spoil=lambda folder, state: (folder / "manifest.json").write_text('{"topology": {')),
    ),
    resuming(
        "torn_checkpoint",
        "out/checkpoint-3 is torn: global_step3/zero_states.pt has 10 bytes instead of 1000",
        saved(spoil=lambda folder, state: state.write_bytes(bytes(10))),
    ),
    resuming(
        "incomplete_checkpoint",
        "out/checkpoint-3 is torn: global_step3/zero_states.pt is missing; there is no other",
        TORN,
    ),
    # Sizes are compared by every process for itself, contents by all together.
    resuming(
        "flipped_checkpoint",
        "out/checkpoint-3 is torn: global_step3/zero_states.pt is not what was saved, its SHA-256 differs; there is no",
        saved(spoil=lambda folder, state: state.write_bytes(b"\1" + bytes(999))),
    ),
    resuming("reset_without_checkpoint", "--reset_optimizer needs --resume_from_checkpoint", None, RESET_ALONE),
    resuming(
        "reset_without_weights",
        "out/checkpoint-3 has no hf folder, whose weights --reset_optimizer takes",
        saved(),
        {"reset_optimizer": True},
    ),
    resuming("without_deepspeed", "DeepSpeed must stay off", saved({"zero_stage": -1, "expert_parallel_size": 0})),
    resuming("other_dtype", "the training dtype must stay bfloat16", saved({"dtype": "bfloat16"})),
    resuming("other_model", "holds another model: num_experts=8 there but 4 here", saved(model={"num_experts": 8})),
]

ONE_RANK = [
    Case(
        "rank_1_fails_in_a_collective",
        {},
        "only rank 1 has seen this",
        patches=(Patch("moe_hf.training.run.build_datasets", raises="only rank 1 has seen this", rank=1),),
    ),
    Case(
        "rank_0_fails_in_a_collective",
        {},
        "only rank 0 has seen this",
        patches=(Patch("moe_hf.training.run.build_datasets", raises="only rank 0 has seen this", rank=0),),
    ),
]

CASES = [*COMMAND_LINE, *MODELS, *DEEPSPEED, *LOSSES, *DATA, *CHECKPOINTS, *ONE_RANK]
