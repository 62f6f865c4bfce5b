"""Measure training of mixtures of experts beside what else a user could take.

    python -m benchmarks.run                                    # the GPU where there is one, else the CPU
    python -m benchmarks.run --suite layer --config e64 --peers mixtral/eager,mixtral/grouped_mm
    python -m benchmarks.run --suite memory,comm --output results.json

Ends with one Markdown table on standard output; everything else goes to standard error. SIGINT, SIGTERM and errors end
it early, with what is done so far. The exit code is 1 where our own row is wrong.
"""

import argparse
import json
import os
import signal
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from moe_hf.errors import UserError

if TYPE_CHECKING:
    from .results import Row

SUITES = ("layer", "step", "memory", "comm", "scaling", "profile")
_ROUNDS = 12


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument("--suite", type=_suites, default=SUITES, metavar="NAME,…", help=f"{', '.join(SUITES)} or all")
    parser.add_argument("--config", type=_names, metavar="NAME,…", help="sizes (default: all of the suite and device)")
    parser.add_argument("--peers", type=_names, metavar="NAME,…", help="auto, or beside whom ours is measured")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON here")
    parser.add_argument("--rounds", type=_count, default=_ROUNDS, metavar="N", help=f"of timing (default: {_ROUNDS})")
    parser.add_argument(
        "--allow-busy", action="store_true", help="measure beside other work, and mark the results as not usable"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the suites that the command line names; a user's mistake is one sentence and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args(argv)
    try:
        _measure(arguments, argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _measure(arguments: argparse.Namespace, argv: list[str]) -> None:
    from . import machine

    device = machine.resolve_device(arguments.device)
    machine.restart_with(machine.environment_of(device), argv)
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise UserError(f"--output {arguments.output} cannot be written: there is no folder {arguments.output.parent}.")
    # Libraries print what they like on standard output, where only the table is to be.
    table, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)

    from transformers.utils import logging

    logging.set_verbosity_error()

    from .peers.registry import OURS
    from .results import FAILED
    from .suites import run_suites
    from .watching import LoadWatch

    # Before anything runs: a GPU that a kernel has broken answers no more.
    about = _about(arguments, device)
    watch, rows, finished = LoadWatch(arguments.allow_busy), [], False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        rows.extend(run_suites(arguments, device, watch))
        finished = True
    except KeyboardInterrupt:
        print("Stopped: what is done so far is reported.", file=sys.stderr)
    finally:
        if rows or finished:
            about |= {"usable": not watch.disturbed, "finished": finished}
            _report(rows, about, arguments.output, table)
    if not finished:
        sys.exit(130)
    if wrong := [row for row in rows if row.peer == OURS and row.status == FAILED]:
        cases = ", ".join(f"{row.suite} {row.config}" for row in wrong)
        print(f"error: {OURS} failed in {cases}; the table says why.", file=sys.stderr)
        sys.exit(1)


def _report(rows: list["Row"], about: dict, output: Path | None, table: TextIO) -> None:
    """Write the file of results and the table."""
    from .report import FLOPS_NOTE, markdown_table
    from .results import as_json

    if output is not None:
        output.write_text(json.dumps(about | {"rows": list(as_json(rows))}, indent=1) + "\n")
    if not about["usable"]:
        print("**Not usable: other processes ran at the same time.**\n", file=table)
    note = f"\n{FLOPS_NOTE}\n" if any("tflops" in row.values for row in rows) else ""
    print(f"{markdown_table(rows)}\n{note}", end="", file=table, flush=True)


def _about(arguments: argparse.Namespace, device: str) -> dict:
    from . import machine
    from .report import FLOPS_NOTE

    return {
        "machine": machine.describe_machine(device),
        "versions": machine.versions(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "rounds": arguments.rounds,
        "flops": FLOPS_NOTE,
    }


def _names(text: str) -> list[str] | None:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("there is no name in it")
    return None if names == ["auto"] else names


def _suites(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if names == ("all",):
        return SUITES
    for name in names:
        if name not in SUITES:
            raise argparse.ArgumentTypeError(f"{name!r} is not a suite; there are {', '.join(SUITES)} and all")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    main()
