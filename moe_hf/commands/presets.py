"""`moe-hf presets`: list the configurations for `--config_name`, or print a small twin of one.

With `--json` the list is one object: for every preset its `size` as `moe-hf inspect --json` tells it.
"""

import argparse
import json
from dataclasses import asdict

from ..presets import preset_names, read_preset
from ..presets.scaling import scaled_down

# A weight and its gradient in BF16, and in FP32 the weight that the optimizer changes and its two moments.
_WEIGHT_BYTES = 2
_TRAINING_BYTES = 2 + 2 + 4 + 4 + 4

_FOOTNOTE = """
Parameters include the embeddings, tied ones once; active are those that one token uses. Weights are in BF16, 2 bytes a
parameter. The training state, 16 bytes a parameter, is BF16 weights and gradients with FP32 weights and two moments of
Adam, in all: before DeepSpeed splits it over ranks, and without activations.
"""


def add_parser(commands) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "presets",
        help="list the configurations for --config_name, with parameter counts and memory",
        description="List the configurations for --config_name, with parameter counts and memory.",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--scaled_down",
        "--scaled-down",
        choices=preset_names(),
        metavar="PRESET",
        help="print, as JSON, the same layers and routing with tiny matrices: for --config_name of a trial run",
    )
    output.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=_presets)


def _presets(arguments: argparse.Namespace) -> None:
    if arguments.scaled_down is not None:
        print(json.dumps(scaled_down(read_preset(arguments.scaled_down)), indent=2))
        return
    from ..checkpoint.description import size_of
    from ..configuration_moe import MoEConfig

    sizes = {name: size_of(MoEConfig(**read_preset(name))) for name in preset_names()}
    if arguments.json:
        print(json.dumps({name: {"size": asdict(size)} for name, size in sizes.items()}, indent=2))
        return
    print(
        f"{'preset':<14} {'parameters':>14} {'active':>14}  {'layers (sparse)':<15}  {'experts':>7}  {'per token':>9} "
        f"{'weights':>9} {'training state':>14}"
    )
    for name, size in sorted(sizes.items(), key=lambda item: item[1].active_parameters):
        print(_row(name, size))
    print(_FOOTNOTE, end="")


def _row(name: str, size) -> str:
    from tqdm import tqdm

    layers = f"{size.layers} ({size.sparse_layers})"
    weights, state = (tqdm.format_sizeof(count * size.parameters, "B") for count in (_WEIGHT_BYTES, _TRAINING_BYTES))
    return (
        f"{name:<14} {size.parameters:>14,} {size.active_parameters:>14,}  {layers:<15}  {size.experts:>7}  "
        f"{size.experts_per_token:>9} {weights:>9} {state:>14}"
    )
