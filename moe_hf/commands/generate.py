"""`moe-hf generate`: let an exported model continue a text, or one line after the other."""

import argparse
from pathlib import Path

from ..errors import CheckpointError, ConfigError


def add_parser(commands) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser("generate", help="let an exported model continue a text, or one line after the other")
    parser.add_argument("model", help="folder of an export")
    parser.add_argument("--prompt", help="text to continue; without it, prompts are read from the terminal")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest continuation (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_generate)


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
