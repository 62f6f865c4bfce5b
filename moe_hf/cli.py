"""The `moe-hf` command: what one does with a model besides training it."""

import argparse
import os
import sys

from . import __version__
from .commands import convert, doctor, export, generate, inspect, plan, presets, push, report, tokenize, upcycle
from .errors import UserError

COMMANDS = (export, convert, upcycle, inspect, push, generate, report, presets, plan, doctor, tokenize)


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
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
