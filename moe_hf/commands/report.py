"""`moe-hf report`: one page of tables and figures on training runs, side by side."""

import argparse
from pathlib import Path


def add_parser(commands) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "report",
        help="draw what training runs have logged: losses, the experts' load, gradients, throughput",
        description="Write one HTML page that needs no other file, with each of its figures as PNG beside it, from the "
        "metrics.jsonl of training runs. Several runs are aligned by the tokens that they have seen.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="OUTPUT_DIR of a training run")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report"),
        help="folder to write into: a new one, or one that holds only an earlier report, which is replaced "
        "(default: report)",
    )
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    from ..reporting.page import check_output, write_report
    from ..reporting.runs import read_runs
    from ..reporting.summary import as_markdown

    check_output(arguments.output)
    runs = read_runs(arguments.runs)
    page = write_report(runs, arguments.output)
    print(as_markdown(runs), page, sep="\n\n")
