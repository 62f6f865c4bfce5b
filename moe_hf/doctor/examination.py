"""The order of the doctor's work: the installation, the run, then the self-test."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..configuration_moe import MoEConfig
from ..errors import ConfigError
from ..parallel.deepspeed_config import read_deepspeed_json, zero_stage
from ..training.arguments import ModelArguments, construct, parse_arguments
from ..training.checked_run import CheckedRun
from ..training.model_config import build_config
from .compiler import check_compiler
from .findings import ADVICE, SKIPPED, Finding, Report
from .hardware import check_accelerator, check_interconnect, num_accelerators
from .legality import check_run
from .self_test import choose_ranks, run_self_test
from .space import check_cache, check_output, check_shared_memory
from .verdict import AREA
from .versions import check_versions

_DEFAULT_OUTPUT = "trainer_output"
_RANKS_OF_A_CPU = 2


@dataclass(frozen=True)
class Request:
    """What is to be examined.

    Args:
        argv: the words after `run_clm_moe.py` of the run; none for the installation alone.
        num_ranks: processes of the run; `None` for one on each accelerator here, or two on a CPU.
        per_machine: processes on each machine.
        self_test_ranks: processes of the self-test; 0 for none, `None` for as many as make sense here.
        work_dir: keeps the files of the self-test.
        patience: seconds without progress after which the self-test is ended.
    """

    argv: list[str]
    num_ranks: int | None = None
    per_machine: int = 8
    self_test_ranks: int | None = None
    work_dir: Path | None = None
    patience: float = 300.0


def examine(request: Request, say: Callable[[str], None]) -> Report:
    """Look at everything that the request names; `say` is told at what.

    Raises:
        UserError: the request contradicts itself, or names what is not there or cannot be read.
    """
    if not request.argv:
        report = _installation(request, None, None, say)
        report.findings.append(_untested("no run was named: give --config_name, --deepspeed and --gpus"))
        return report
    argv = request.argv if {"--do_train", "--do_eval"} & set(request.argv) else [*request.argv, "--do_train"]
    namespace, num_ranks = parse_arguments(argv), _num_ranks(request)
    if namespace.deepspeed is None:
        raise ConfigError("A run without --deepspeed has no processes to examine; add --deepspeed ds_configs/….json.")
    deepspeed_json = read_deepspeed_json(namespace.deepspeed)
    config = build_config(construct(ModelArguments, namespace))
    report = _installation(request, namespace, deepspeed_json, say)
    say("model, JSON and processes")
    run, findings = check_run(argv, num_ranks, request.per_machine)
    report.findings += [*findings, _output(namespace, config, deepspeed_json if run is None else run.deepspeed_json)]
    if run is None or request.self_test_ranks == 0:
        report.findings.append(_untested("not asked for" if run is not None else "the run itself is refused"))
        return report
    _try_out(request, run, report, say)
    return report


def _num_ranks(request: Request) -> int:
    return request.num_ranks or num_accelerators() or _RANKS_OF_A_CPU


def _installation(
    request: Request, namespace: argparse.Namespace | None, deepspeed_json: dict | None, say: Callable[[str], None]
) -> Report:
    """Look at what does not depend on the model."""
    report, num_ranks = Report(), None if namespace is None else _num_ranks(request)
    say("versions")
    report.findings += check_versions()
    say("compiler")
    report.findings += check_compiler(deepspeed_json)
    say("accelerator and interconnect")
    report.findings += check_accelerator(num_ranks, bf16=namespace is not None and bool(namespace.bf16))
    report.findings += check_interconnect()
    here = min(_num_ranks(request), request.per_machine)
    return Report([*report.findings, check_shared_memory(here, on_cpu=num_accelerators() == 0), check_cache()])


def _output(namespace: argparse.Namespace, config: MoEConfig, deepspeed_json: dict) -> Finding:
    """Compare the disk of the output folder with the checkpoints that are there at the same time."""
    strategy = getattr(namespace.save_strategy, "value", namespace.save_strategy)
    # One that is being written besides those that are kept.
    kept = 0 if strategy == "no" else (namespace.save_total_limit or 0) + 1
    return check_output(
        namespace.output_dir or _DEFAULT_OUTPUT,
        config,
        in_16_bits=namespace.bf16 or namespace.fp16,
        stage=zero_stage(deepspeed_json),
        kept=kept,
    )


def _try_out(request: Request, run: CheckedRun, report: Report, say: Callable[[str], None]) -> None:
    num_ranks, on_cpu, why = choose_ranks(run, request.self_test_ranks)
    if why:
        report.findings.append(Finding(AREA, "not as the run", ADVICE, why))
    findings, report.self_test = run_self_test(
        run, num_ranks, on_cpu=on_cpu, folder=request.work_dir, patience=request.patience, say=say
    )
    report.findings += findings


def _untested(why: str) -> Finding:
    return Finding(AREA, "not tried", SKIPPED, why)
