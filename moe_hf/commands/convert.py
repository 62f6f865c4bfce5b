"""`moe-hf convert`: turn a model of another architecture into ours, or ours into another."""

import argparse

DTYPES = ("float32", "bfloat16", "float16")

# Spelt out here, because asking the package for it would import torch for every --help.
ARCHITECTURES = (
    "moe_hf",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "glm4_moe",
    "dots1",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)


def add_parser(commands) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "convert",
        help="turn a model of another architecture into moe_hf, to train it here, or the other way",
        description="Reads and writes one tensor at a time. Weights are read from safetensors only, no code is run.",
    )
    parser.add_argument("--model", required=True, help="folder of a model, or ORG/NAME on the hub")
    parser.add_argument("--output", required=True, help="new folder for the converted model")
    parser.add_argument(
        "--to", default="moe_hf", choices=ARCHITECTURES, metavar="ARCHITECTURE", help=", ".join(ARCHITECTURES)
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: as stored)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: 5GB)")
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    import torch

    from ..checkpoint.convert import convert

    convert(
        arguments.model,
        arguments.output,
        to=arguments.to,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        max_shard_size=arguments.max_shard_size,
        show_progress=True,
    )
    print(f"{arguments.model} → {arguments.output} ({arguments.to})")
