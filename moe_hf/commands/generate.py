"""`moe-hf generate`: let a model continue a text, or one line after the other from a terminal or a pipe."""

import argparse
import contextlib
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from ..errors import CheckpointError, ConfigError, DataError, UserError


def add_parser(commands) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "generate",
        help="let a model continue a text, or one line after the other",
        description="Let a model continue a text as it is written. Without --prompt every line of the terminal or of a "
        "pipe is a prompt; Ctrl-C ends a text, Ctrl-D the program.",
    )
    parser.add_argument("model", help="folder of an export, of moe_hf or of an architecture of Transformers")
    parser.add_argument("--prompt", help="text to continue; without it, every line of the standard input is one")
    parser.add_argument(
        "--max_new_tokens",
        "--max-new-tokens",
        type=int,
        default=128,
        help="longest continuation, at most up to the model's last position (default: 128)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0 always takes the likeliest token (default: 0.7)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: 0)")
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> None:
    _check(arguments)
    model, tokenizer = _load(Path(arguments.model))
    from transformers import set_seed

    set_seed(arguments.seed)
    if arguments.prompt is not None:
        return _continue(model, tokenizer, arguments.prompt, arguments)
    interactive = sys.stdin.isatty()
    for prompt in _prompts(interactive):
        try:
            _continue(model, tokenizer, prompt, arguments)
        except UserError as error:
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if not interactive:
                raise


def _check(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens {arguments.max_new_tokens} must be at least 1.")
    if not 0 <= arguments.temperature < math.inf:
        raise ConfigError(f"--temperature {arguments.temperature} must be 0 or a positive number.")
    if not 0 <= arguments.seed < 2**32:
        raise ConfigError(f"--seed {arguments.seed} must be between 0 and {2**32 - 1}.")
    if arguments.prompt == "":
        raise ConfigError("--prompt is empty; give a text to continue, or leave the flag away.")


def _load(folder: Path):
    """Return model and tokenizer; nothing of the folder but its numbers and tables is used, no code and no pickle."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers import logging as transformers_logging

    from ..checkpoint.description import read_config
    from ..checkpoint.weights import SafetensorsFolder

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = read_config(folder)
    if getattr(config, "router_balancing", None) == "expert_choice" and config.num_sparse_layers:
        raise ConfigError(
            f"{folder} cannot generate: its experts choose among all tokens, later ones included "
            "(router_balancing='expert_choice')."
        )
    SafetensorsFolder(folder)  # says in one sentence which file is missing or damaged
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise CheckpointError(f"{folder} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            device_map="auto",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever the readers of three formats raise: the folder is what is wrong
        raise CheckpointError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{folder} is incomplete: it has no {missing[0]} (moe-hf inspect lists what is missing).")
    return model.eval(), tokenizer


def _continue(model, tokenizer, prompt: str, arguments: argparse.Namespace) -> None:
    """Print the prompt and its continuation while it is generated; what is there is printed on Ctrl-C too."""
    import torch
    from transformers import StoppingCriteriaList, TextStreamer

    encoded = tokenizer(prompt, return_tensors="pt")
    inputs = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    max_new_tokens = min(arguments.max_new_tokens, _room(model, inputs["input_ids"]))
    sampling = {"temperature": arguments.temperature} if arguments.temperature > 0 else {}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    with _interruption() as pressed:

        def stop(tokens: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
            return torch.full((len(tokens),), bool(pressed), device=tokens.device)

        model.generate(
            **inputs,
            **sampling,
            do_sample=arguments.temperature > 0,
            num_beams=1,  # a stream has no second thoughts, whatever the folder's generation_config.json says
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([stop]),
        )
    if pressed:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _interruption() -> Iterator[list[int]]:
    """Remember Ctrl-C in the list that is returned, instead of raising wherever the program is just then.

    A destructor or a callback that happens to run would swallow the exception. The second Ctrl-C raises.
    """
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _room(model, input_ids) -> float:
    """Return how many tokens may follow `input_ids` of shape `(1, S)`, or raise `UserError` if none may."""
    num_tokens = input_ids.shape[1]
    if num_tokens == 0:
        raise DataError("The prompt has no tokens; give a text to continue.")
    if (largest := int(input_ids.max())) >= (rows := model.get_input_embeddings().num_embeddings):
        raise CheckpointError(
            f"The tokenizer gives token {largest} but the model has {rows}; use the tokenizer it was trained with."
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    if num_tokens >= positions:
        raise DataError(
            f"The prompt has {num_tokens} tokens but the model has {positions} positions; "
            f"give at most {positions - 1} tokens."
        )
    return positions - num_tokens


def _prompts(interactive: bool) -> Iterator[str]:
    """Yield the lines of the standard input that are not empty, until it ends."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (lets input() edit and recall lines)
    while True:
        try:
            line = input("prompt> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            continue
        except UnicodeDecodeError as error:
            raise DataError(f"The standard input is not valid UTF-8 ({error.reason}); give text.") from None
        if line:
            yield line
