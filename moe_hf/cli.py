"""The `moe-hf` command: what one does with a model besides training it."""

import argparse
import sys

from . import __version__
from .commands import generate, presets
from .errors import UserError

COMMANDS = (generate, presets)


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand; a user's mistake is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(prog="moe-hf", description=__doc__)
    parser.add_argument("--version", action="version", version=f"moe_hf {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
