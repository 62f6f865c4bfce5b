"""The command line of run_clm_moe.py: three dataclasses, and one way to read them from flags or a file."""

import argparse
import difflib
import json
import re
from dataclasses import dataclass, field, fields
from typing import NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from ..data.arguments import DataArguments
from ..errors import ConfigError, UserError
from .argument_files import EXTENSIONS, read_argument_file
from .parallel_arguments import ParallelArguments
from .precision_arguments import PrecisionArguments
from .router_arguments import RouterArguments
from .speed_arguments import SpeedArguments


@dataclass
class ModelArguments:
    """Which model to train: a preset or configuration file with overrides, or a folder to continue from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Continue from this Hugging Face folder instead of from random weights."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Preset name, or path of a JSON or YAML file with MoEConfig's fields."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": 'Change fields of the configuration: "num_experts=8,head_dim=None,…".'}
    )
    pad_vocab_to_multiple_of: int | None = field(
        default=None,
        metadata={"help": "Make vocab_size the length of --tokenizer_name rounded up to a multiple of this, as 128."},
    )
    num_experts: int | None = field(default=None, metadata={"help": "Experts of every sparse layer; 0 for dense."})
    num_experts_per_tok: int | None = field(default=None, metadata={"help": "Experts that each token visits."})
    decoder_sparse_step: int | None = field(default=None, metadata={"help": "Every n-th layer is sparse."})
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the residual stream."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Number of decoder layers."})
    router_aux_loss_coef: float | None = field(default=None, metadata={"help": "Weight of the load-balancing loss."})
    router_z_loss_coef: float | None = field(default=None, metadata={"help": "Weight of the router z-loss."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2 or flex_attention; default: the best there is."}
    )
    experts_implementation: str | None = field(
        default=None,
        metadata={
            "help": "moe_hf (our kernel), sonicmoe, grouped_mm, batched_mm, eager, …, for experts that AutoEP does not "
            "run: those it does always run by our kernel. Default: sonicmoe with --bf16 on a Hopper GPU where "
            "moe_hf[sonicmoe] is installed, else moe_hf."
        },
    )


@dataclass
class MoETrainingArguments(ParallelArguments, RouterArguments, PrecisionArguments, SpeedArguments, TrainingArguments):
    """`TrainingArguments` with what expert parallelism needs, and defaults that hide nothing."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints and the export of an earlier run in output_dir."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on from this checkpoint-N folder, from the newest whole one of output_dir (true), or from that "
            "one and anew where there is none (auto)."
        },
    )
    reset_optimizer: bool = field(
        default=False,
        metadata={
            "help": "Take only the weights from --resume_from_checkpoint, as its hf folder holds them (rounded to the "
            "training dtype): optimizer, schedule and step count start anew, on any number of processes."
        },
    )
    max_skipped_steps: int = field(
        default=10, metadata={"help": "Stop after this many steps in a row were skipped for NaN or infinity."}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest safetensors file of an export."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and infinite losses from the log. Off: they should be seen."}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            # Unless told, Accelerate takes several processes without an accelerator for several separate runs.
            self.use_cpu = True
        if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", self.max_shard_size, re.IGNORECASE):
            raise ConfigError(f'max_shard_size={self.max_shard_size} must be a number of KB, MB, GB or TB, like "5GB".')
        self.check_router_arguments()
        self.check_precision_arguments()
        self.check_speed_arguments()
        super().__post_init__()
        self.apply_tf32()
        if self.gradient_checkpointing or getattr(self, "activation_checkpointing", None):
            self._forbid_reentrant_checkpointing()

    def _forbid_reentrant_checkpointing(self) -> None:
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            kwargs = getattr(self, name, None)
            if kwargs is not None and kwargs.get("use_reentrant") is not False:
                # Torch's default. Their first forward records no graph, so the router losses would have no gradient.
                raise ConfigError(
                    f"{name}={kwargs} would switch the router losses off; it must have use_reentrant=False."
                )
            if kwargs is not None and not kwargs.get("preserve_rng_state", True):
                raise ConfigError(
                    f"{name}={kwargs} would let recomputation draw other noise; leave preserve_rng_state out."
                )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the lines of the commands in the description."""


class _Parser(HfArgumentParser):
    """Raises instead of printing a usage wall, and suggests the flag that was meant."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}; see --help.")

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.dest == "report_to":
                action.nargs = "+"  # declared as a word or a list, which a flag otherwise takes for a word

    def words(self, values: dict[str, str | list[str]]) -> list[str]:
        """Return the values of an argument file as words of a command line."""
        takes_many = {action.dest for action in self._actions if action.nargs in ("+", "*")}
        words = []
        for name, value in values.items():
            if isinstance(value, str) and name not in takes_many:
                words.append(f"--{name}={value}")
            elif name in takes_many:
                words += [f"--{name}", *([value] if isinstance(value, str) else value)]
            else:
                raise ConfigError(f"{name}: {value} is a list, but {name} takes one value.")
        return words

    def check_known(self, names: list[str], written: str) -> None:
        known = {action.dest for action in self._actions}
        for name in names:
            if name not in known:
                nearest = difflib.get_close_matches(name, sorted(known), n=1)
                hint = f"did you mean {written.format(nearest[0])}?" if nearest else "see --help for all."
                raise ConfigError(f"{written.format(name)} is not an argument of run_clm_moe.py; {hint}")


def build_parser(description: str | None = None) -> HfArgumentParser:
    """Return the parser of all arguments."""
    return _Parser(
        (ModelArguments, DataArguments, MoETrainingArguments),
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )


def parse_arguments(argv: list[str], description: str | None = None) -> argparse.Namespace:
    """Read flags, or a JSON or YAML file given first, whose values the flags after it override.

    Nothing is constructed yet: `TrainingArguments` starts the process group, and everything that can be wrong is to be
    found before.

    Raises:
        ConfigError: an unknown argument, a value of the wrong type, or an unreadable file.
    """
    parser = build_parser(description)
    # The deepspeed launcher puts --local_rank=N before the user's words.
    first = next((word for word in argv if not word.startswith("--local_rank")), "")
    if first.endswith(EXTENSIONS):
        values = read_argument_file(first)
        parser.check_known(list(values), "{}")
        argv = parser.words(values) + [word for word in argv if word is not first]
    namespace, unknown = parser.parse_known_args(argv)
    flags = [word.split("=")[0].removeprefix("--") for word in unknown if word.startswith("--")]
    parser.check_known(flags, "--{}")
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is not preceded by a flag; see --help.")
    _check_dictionaries(namespace)
    return namespace


def construct(dataclass_type: type, namespace: argparse.Namespace, **replaced):
    """Build one of the argument dataclasses from the parsed namespace, with some values replaced.

    Raises:
        ConfigError: the values contradict each other, or need a package that is not installed.
    """
    values = {f.name: getattr(namespace, f.name) for f in fields(dataclass_type) if f.init}
    try:
        return dataclass_type(**(values | replaced))
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error


def _check_dictionaries(namespace: argparse.Namespace) -> None:
    """Name the flag and its value; `TrainingArguments` names neither, and takes what does not begin with a brace."""
    for name, value in vars(namespace).items():
        if name.endswith("_kwargs") and isinstance(value, str):
            try:
                is_dictionary = isinstance(json.loads(value), dict)
            except ValueError:
                is_dictionary = False
            if not is_dictionary:
                raise ConfigError(f"--{name} {value} is not a JSON object; write it like '{{\"key\": true}}'.")
