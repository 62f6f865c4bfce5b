"""`moe-hf export`: write a training checkpoint as a Hugging Face folder, in one process without an accelerator."""

import argparse
from pathlib import Path

from ..errors import ConfigError
from .convert import ARCHITECTURES, DTYPES


def add_parser(commands) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser("export", help="write a training checkpoint, or a model, in Hugging Face format")
    parser.add_argument("--checkpoint", required=True, help="checkpoint-N of a run, or a folder with a model")
    parser.add_argument("--output", required=True, help="new folder to write")
    parser.add_argument(
        "--to", default="moe_hf", choices=ARCHITECTURES, metavar="ARCHITECTURE", help=", ".join(ARCHITECTURES)
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: the dtype of training)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: 5GB)")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from ..checkpoint.convert import write_model
    from ..checkpoint.offline import open_exportable

    checkpoint, output = Path(arguments.checkpoint), Path(arguments.output)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    # Refused before a large checkpoint is read through.
    if output.exists():
        raise ConfigError(f"--output {output} is already there; give a new folder.")
    with tqdm(desc="verifying", unit="file", leave=False) as bar:
        source = open_exportable(checkpoint, lambda name: bar.update())
    with tqdm(desc="exporting", unit="tensor") as bar:
        write_model(
            source,
            output,
            to=arguments.to,
            dtype=dtype,
            max_shard_size=arguments.max_shard_size,
            on_tensor=lambda name: bar.update(),
        )
    print(f"{checkpoint} → {output} ({arguments.to}, {str(dtype or source.dtype).removeprefix('torch.')})")
