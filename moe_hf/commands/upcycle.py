"""`moe-hf upcycle`: make a mixture of experts of a dense model, to train it on from there."""

import argparse
import re

from ..errors import ConfigError

# The flags that only one method reads.
_METHOD_FLAGS = {
    "copy": (),
    "noise": ("noise_std", "noise_fraction"),
    "granular": ("granularity",),
    "drop": ("drop_ratio",),
}


def add_parser(commands) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser("upcycle", help="make a mixture of experts of a dense model")
    parser.add_argument(
        "--model", required=True, help="folder or hub id of a dense model (Llama, Qwen, Mistral, moe_hf)"
    )
    parser.add_argument("--output", required=True, help="folder that is to be written; it must not be there yet")
    parser.add_argument("--num-experts", type=int, required=True, help="experts of every sparse layer")
    parser.add_argument("--num-experts-per-tok", type=int, required=True, help="experts that each token visits")
    parser.add_argument(
        "--method",
        choices=list(_METHOD_FLAGS),
        required=True,
        help="experts are copies of the MLP, copies with noise, shards of it (same logits with more and smaller "
        "experts), or copies of which a part is drawn anew",
    )
    parser.add_argument(
        "--layers", default="all", help="layers that become sparse: all (default), every-N, or indices as in 1,3,5"
    )
    parser.add_argument("--granularity", type=int, help="granular: shards of the MLP; divides both numbers of experts")
    parser.add_argument(
        "--noise-std", type=float, help="noise: standard deviation, relative to each matrix's own (default: 0.1)"
    )
    parser.add_argument("--noise-fraction", type=float, help="noise: share of the weights that get it (default: 0.5)")
    parser.add_argument("--drop-ratio", type=float, help="drop: share of the units drawn anew (default: 0.5)")
    parser.add_argument(
        "--router-std", type=float, help="standard deviation of the router's weights (default: initializer_range)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the model")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: 5GB)")
    parser.set_defaults(run=_upcycle)


def _upcycle(arguments: argparse.Namespace) -> None:
    import torch

    from ..checkpoint.model_card import active_parameters
    from ..checkpoint.upcycling import UpcyclingRecipe, upcycle

    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", arguments.max_shard_size, re.IGNORECASE):
        raise ConfigError(
            f'--max-shard-size {arguments.max_shard_size} must be a number of KB, MB, GB or TB, like "5GB".'
        )
    recipe = UpcyclingRecipe(
        method=_make_method(arguments),
        num_experts=arguments.num_experts,
        num_experts_per_tok=arguments.num_experts_per_tok,
        layers=arguments.layers,
        seed=arguments.seed,
        router_std=arguments.router_std,
    )
    config = upcycle(
        arguments.model,
        arguments.output,
        recipe,
        dtype=arguments.dtype and getattr(torch, arguments.dtype),
        max_shard_size=arguments.max_shard_size,
        show_progress=True,
    )
    count = active_parameters(config)
    print(f"{arguments.output}: {count.total:,} parameters, {count.active:,} active for one token.")


def _make_method(arguments: argparse.Namespace):
    from ..checkpoint.upcycling import Copy, Drop, Granular, Noise

    name = arguments.method
    for owner, flags in _METHOD_FLAGS.items():
        for flag in flags:
            if owner != name and (value := getattr(arguments, flag)) is not None:
                words = flag.replace("_", "-")
                raise ConfigError(f"--{words} {value} has no effect with --method {name}; it belongs to {owner}.")
    given = {flag: value for flag in _METHOD_FLAGS[name] if (value := getattr(arguments, flag)) is not None}
    if name == "granular" and not given:
        raise ConfigError("--method granular needs --granularity, into how many experts the MLP is cut.")
    method = {"copy": Copy, "noise": Noise, "granular": Granular, "drop": Drop}[name]
    # The fields are named without the method's name.
    return method(**{flag.removeprefix(f"{name}_"): value for flag, value in given.items()})
