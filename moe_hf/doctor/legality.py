"""Whether model, DeepSpeed JSON and number of processes go together: what run_clm_moe.py itself would say."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UserError
from ..parallel import placement
from ..training.checked_run import CheckedRun, check_command_line
from .findings import ADVICE, OK, WRONG, Finding

_AREA = "run"


def check_run(argv: list[str], num_ranks: int, per_machine: int) -> tuple[CheckedRun | None, list[Finding]]:
    """Put a command line through all that run_clm_moe.py looks at before processes speak with each other.

    Args:
        argv: the words after `run_clm_moe.py`.
        num_ranks: processes of the run.
        per_machine: processes on each machine.

    Returns:
        What the command line stands for, `None` when it is refused; and what was found.
    """
    try:
        with launched(num_ranks, per_machine), _warnings_of(placement.logger) as warnings:
            run = check_command_line(argv)
    except UserError as error:
        remedy = "run_clm_moe.py would end with this sentence"
        return None, [Finding(_AREA, "model x JSON x processes", WRONG, " ".join(str(error).split()), remedy)]
    findings = [Finding(_AREA, "model x JSON x processes", OK, run.topology.describe())]
    return run, findings + [Finding(_AREA, "placement", ADVICE, sentence) for sentence in warnings]


@contextmanager
def launched(num_ranks: int, per_machine: int) -> Iterator[None]:
    """Let this process find the environment that the launcher would give rank 0."""
    given = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": num_ranks, "LOCAL_SIZE": min(per_machine, num_ranks)}
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in given.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _warnings_of(logger: logging.Logger) -> Iterator[list[str]]:
    sentences: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: sentences.append(record.getMessage())
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield sentences
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
