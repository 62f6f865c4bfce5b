"""The `moe-hf` command: what one does with a model besides training it."""

import argparse
import sys
from pathlib import Path

from . import __version__
from .errors import CheckpointError, ConfigError, UserError
from .presets import preset_names


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand; a user's mistake is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(prog="moe-hf", description=__doc__)
    parser.add_argument("--version", action="version", version=f"moe_hf {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate", help="let an exported model continue a text, or one line after the other"
    )
    generate.add_argument("model", help="folder of an export")
    generate.add_argument("--prompt", help="text to continue; without it, prompts are read from the terminal")
    generate.add_argument("--max_new_tokens", type=int, default=128, help="longest continuation (default: 128)")
    generate.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token")
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(run=_generate)

    presets = commands.add_parser("presets", help="list the configurations for --config_name, with parameter counts")
    presets.set_defaults(run=_presets)

    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _generate(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not (Path(arguments.model) / "config.json").is_file():
        raise CheckpointError(f"{arguments.model} is not a folder with an exported model; give OUTPUT_DIR/hf of a run.")
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens {arguments.max_new_tokens} must be at least 1.")
    if arguments.prompt == "":
        raise ConfigError("--prompt is empty; give a text to continue, or leave the flag away.")
    try:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
        model.to(torch.accelerator.current_accelerator() or "cpu")
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    except Exception as error:  # whatever the readers of three formats raise: the folder is what is wrong
        raise CheckpointError(f"{arguments.model} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    set_seed(arguments.seed)
    sampling = {"do_sample": arguments.temperature > 0}
    if arguments.temperature > 0:
        sampling["temperature"] = arguments.temperature
    for prompt in [arguments.prompt] if arguments.prompt else _prompts():
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        model.generate(
            **inputs,
            **sampling,
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )


def _prompts():
    """Yield what is typed until the input ends."""
    while True:
        try:
            if prompt := input("prompt> "):
                yield prompt
        except EOFError:
            return


def _presets(arguments: argparse.Namespace) -> None:
    from .checkpoint.model_card import active_parameters
    from .presets import read_preset
    from .training.model_config import make_config

    print(f"{'preset':<16} {'parameters':>14} {'active':>14}  layers (sparse)  experts  per token")
    for name in preset_names():
        config = make_config(read_preset(name))
        count = active_parameters(config)
        layers = f"{config.num_hidden_layers} ({config.num_sparse_layers})"
        print(
            f"{name:<16} {count.total:>14,} {count.active:>14,}  {layers:<15}  {config.num_experts:>7}  "
            f"{config.num_experts_per_tok:>9}"
        )
