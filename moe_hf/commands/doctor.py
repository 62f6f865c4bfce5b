"""`moe-hf doctor`: would a run work here? Looked at, and tried scaled down, before GPU-hours are spent.

With `--json` one object is printed; fields may be added, none changes its meaning.

`well` (bool: nothing is wrong), `findings` (each {`area`, `name`, `status`, `found`, `remedy`}; `status` is `"ok"`,
`"advice"` (works, but could be better), `"wrong"` or `"skipped"`; `remedy` is empty where there is nothing to change),
and `self_test`, null when none was run: {`ranks`, `on_cpu`, `layout` (in words), `seconds`, `losses`, `grad_norms`,
`losses_of_one_process`, `grad_norms_of_one_process` (by step; null where the processes did not get so far),
`exchange` (`all_reduce` and `all_to_all`, each {`seconds`, `bytes`, `gigabytes_per_second`, `right`}, or null),
`last_lines` (of what the processes have printed, when they ended with an error)}.
"""

import argparse
import contextlib
import json
import logging
import signal
import sys
from pathlib import Path

# Flags of run_clm_moe.py that say what is most often examined; the others follow after `--`.
_RUN_FLAGS = {
    "config_name": "preset, or file with MoEConfig's fields",
    "model_name_or_path": "folder to continue from, instead of --config_name",
    "config_overrides": "changes to the configuration: num_experts=8,…",
    "deepspeed": "DeepSpeed JSON",
    "block_size": "tokens of a row",
    "per_device_train_batch_size": "rows of a micro-batch on every process",
    "gradient_accumulation_steps": "micro-batches of a step",
    "expert_parallel_size": "overrides the JSON",
    "tensor_parallel_size": "overrides the JSON",
    "sequence_parallel_size": "overrides the JSON",
    "pipeline_parallel_size": "overrides the JSON",
    "num_microbatches": "micro-batches that a pipeline works through in a step",
    "save_total_limit": "checkpoints that are kept",
    "output_dir": "where the run will write",
}
_RUN_SWITCHES = {
    "bf16": "train in BF16",
    "fp16": "train in FP16",
    "gradient_checkpointing": "recompute activations",
}


def add_parser(commands) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "doctor",
        help="check an installation and a run, with a self-test of some 20 seconds",
        description="Check this installation; and, where a run is named as for run_clm_moe.py, whether it would work: "
        "model, DeepSpeed JSON and number of processes, room on the disk, and a self-test of the run scaled down. The "
        "exit code is 0 if all is well, 1 if something is wrong, 2 for a mistake in the command line.",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="processes of the run; default: the accelerators here")
    parser.add_argument(
        "--gpus_per_node", "--gpus-per-node", type=int, default=8, metavar="N", help="processes on each machine"
    )
    run = parser.add_argument_group("the run, with the flags of run_clm_moe.py")
    for name, text in _RUN_FLAGS.items():
        run.add_argument(f"--{name}", help=text)
    for name, text in _RUN_SWITCHES.items():
        run.add_argument(f"--{name}", nargs="?", const="true", help=text)
    run.add_argument("words", nargs="*", metavar="FLAGS", help="a file of arguments, or after -- any other flags")
    test = parser.add_argument_group("the self-test")
    test.add_argument(
        "--self_test_ranks",
        "--self-test-ranks",
        type=int,
        metavar="N",
        help="its processes, on the CPU if there are fewer accelerators; 0: no self-test; default: as many as make "
        "sense here",
    )
    test.add_argument("--work_dir", "--work-dir", type=Path, help="keep its files in this new folder")
    test.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="end it when nothing has moved for so long"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    progress = _Progress()
    # What libraries print, some of them when they are imported, is no part of the report.
    with contextlib.redirect_stdout(sys.stderr), _ending_on_sigterm():
        from transformers import logging as transformers_logging

        from ..doctor.examination import examine

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        # On every machine without a GPU it warns that there is none.
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
        report = examine(_request(arguments), progress)
    progress.end()
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        _print_table(report)
    sys.stdout.flush()
    if not report.is_well:
        sys.exit(1)


def _request(arguments: argparse.Namespace):
    from ..doctor.examination import Request
    from ..errors import ConfigError

    for name in ("gpus", "gpus_per_node"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1.")
    if arguments.self_test_ranks is not None and arguments.self_test_ranks < 0:
        raise ConfigError(f"--self_test_ranks {arguments.self_test_ranks} must be 0, for no self-test, or more.")
    if arguments.timeout <= 0:
        raise ConfigError(f"--timeout {arguments.timeout:g} must be more than 0 seconds.")
    flags = [
        word
        for name in (*_RUN_FLAGS, *_RUN_SWITCHES)
        if (value := getattr(arguments, name)) is not None
        for word in (f"--{name}", value)
    ]
    return Request(
        # A file of arguments has to come first.
        argv=[*arguments.words, *flags],
        num_ranks=arguments.gpus,
        per_machine=arguments.gpus_per_node,
        self_test_ranks=arguments.self_test_ranks,
        work_dir=arguments.work_dir,
        patience=arguments.timeout,
    )


@contextlib.contextmanager
def _ending_on_sigterm():
    """Let SIGTERM end this process as Ctrl-C does; by itself it would leave the processes of the self-test behind."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_table(report) -> None:
    from ..doctor.findings import table, verdict

    print("\n".join(table(report.findings)))
    if report.self_test and report.self_test["last_lines"]:
        print("\nThe last lines that the processes of the self-test have printed:")
        print("\n".join(f"  {line}" for line in report.self_test["last_lines"]))
    print(f"\n{verdict(report.findings)}")


class _Progress:
    """Tells on stderr what is being looked at: in one line of a terminal, otherwise in a line each."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._is_terminal:
            print(f"\r\x1b[K{text} …", end="", file=sys.stderr, flush=True)
        else:
            print(f"{text} …", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
