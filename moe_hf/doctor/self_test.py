"""The self-test: the run scaled down, trained, exported, stopped and resumed by real processes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import ConfigError, UserError
from ..modeling_moe import MoEForCausalLM
from ..training.checked_run import CheckedRun, check_command_line
from .findings import OK, SKIPPED, WRONG, Finding
from .hardware import num_accelerators, num_cores
from .launching import Ended, launch
from .layout import best_ranks, fewest_ranks, layout_of
from .legality import launched
from .one_process import train_in_one_process
from .trial import EXACT, RESUME, TRAIN, Trial, command_line, trial_of, write_plan
from .verdict import AREA, EXPORT, NORM, PARITY, RESUMING, STEPS, Outcome, judge, read_outcome

_CHECKS = (PARITY, NORM, STEPS, EXPORT, RESUMING)
# More processes than these would only share the cores of a CPU.
_MOST_CPU_RANKS = 4
_SAID = {
    f"{EXACT}: ": "in float32, ",
    f"{TRAIN}: ": "training, ",
    f"{RESUME}: ": "resuming, ",
}


def choose_ranks(run: CheckedRun, asked: int | None) -> tuple[int, bool, str]:
    """Return how many processes the self-test starts, whether on the CPU, and why not as the run; empty if it is so.

    Args:
        run: with a DeepSpeed JSON.
        asked: number of processes that the user wants, or `None`.

    Raises:
        ConfigError: more processes are asked for than the run has.
    """
    wanted, here = layout_of(run.deepspeed_json, run.topology.world_size), num_accelerators()
    if asked is not None and asked > wanted.ranks:
        raise ConfigError(f"--self_test_ranks {asked} is more than the run has; use at most {wanted.ranks}.")
    if asked is None:
        on_cpu = here < min(wanted.ranks, fewest_ranks(wanted))
        asked = best_ranks(wanted, min(num_cores(), _MOST_CPU_RANKS) if on_cpu else here)
    on_cpu = here < asked
    if asked == wanted.ranks and not (on_cpu and here):
        return asked, on_cpu, ""
    where = "on its cores" if on_cpu else "on its accelerators"
    return asked, on_cpu, f"this machine has {here} accelerators for {wanted.ranks} processes: {asked} tried {where}"


def run_self_test(
    run: CheckedRun, num_ranks: int, *, on_cpu: bool, folder: Path | None, patience: float, say: Callable[[str], None]
) -> tuple[list[Finding], dict | None]:
    """Try a run scaled down on `num_ranks` processes; return what was found, and the numbers.

    Args:
        run: with a DeepSpeed JSON.
        num_ranks: processes.
        on_cpu: whether they compute on the CPU.
        folder: for files, which are left there; `None` for a temporary one.
        patience: seconds without progress after which the processes are ended.
        say: told how far it is.

    Returns:
        The findings, and `self_test` of `moe-hf doctor --json`; `None` where the run cannot be scaled down.
    """
    trial = trial_of(run, num_ranks)
    with _folder(folder) as place:
        try:
            with launched(num_ranks, num_ranks):
                say("self-test: one process")
                plan = write_plan(trial, place)
                check_command_line(command_line(trial, place, "checked"))
        except UserError as error:
            found = f"{trial.layout.describe()} of the same kind are refused: {' '.join(str(error).split())}"
            return [Finding(AREA, "layout", WRONG, found, "give another number with --self_test_ranks")], None
        expected = _train_reference(trial, place)
        ended = launch(plan, num_ranks, on_cpu=on_cpu, patience=patience, say=lambda text: say(_in_words(text)))
        say("self-test: comparing")
        findings = judge(trial, place, expected)
        first = read_outcome(place, trial.exact)
        return _complete(findings, ended, trial) + _measured(first), _numbers(trial, ended, first, expected, on_cpu)


@contextmanager
def _folder(given: Path | None):
    if given is None:
        with tempfile.TemporaryDirectory(prefix="moe_hf_doctor_") as temporary:
            yield Path(temporary)
        return
    if given.exists() and any(given.iterdir()):
        raise ConfigError(f"--work_dir {given} is not empty; give a new folder.")
    given.mkdir(parents=True, exist_ok=True)
    yield given.resolve()


def _train_reference(trial: Trial, folder: Path):
    model = MoEForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, experts_implementation="eager")
    return train_in_one_process(model, trial.rows(), trial.recipe)


def _complete(findings: dict[str, Finding], ended: Ended, trial: Trial) -> list[Finding]:
    """Return a finding for every check; the first that the processes did not get as far as is what went wrong."""
    seconds = f"{ended.seconds:.0f} s"
    launched_well = Finding(AREA, "processes", OK, f"{trial.describe()}; {seconds}")
    if not ended.error:
        return [launched_well, *findings.values()]
    blamed = _check_of(ended.phase)
    remedy = "; ".join(["the last lines that were printed follow the table", "--work_dir keeps all files"])
    if blamed is None:
        wrong = Finding(AREA, "processes", WRONG, f"{trial.describe()}: {ended.error}", remedy)
        return [wrong, *(_of(findings, name) for name in _CHECKS)]
    findings[blamed] = Finding(AREA, blamed, WRONG, ended.error, remedy)
    return [launched_well, *(_of(findings, name) for name in _CHECKS)]


def _of(findings: dict[str, Finding], name: str) -> Finding:
    return findings.get(name, Finding(AREA, name, SKIPPED, "not reached"))


def _check_of(phase: str) -> str | None:
    """Return the check that a phase in which the processes ended belongs to."""
    if "exporting" in phase or "gathering" in phase:
        return RESUMING if phase.startswith(RESUME) else EXPORT
    if phase.startswith(RESUME):
        return RESUMING
    return STEPS if "step" in phase else None


def _measured(outcome: Outcome | None) -> list[Finding]:
    """Return what the exchange of tensors was like."""
    if outcome is None or outcome.exchange is None:
        return []
    findings = []
    for name, measured in outcome.exchange.items():
        found = f"{measured['bytes'] / 1e6:.0f} MB in {1e3 * measured['seconds']:.1f} ms"
        found += f", {measured['gigabytes_per_second']:.2f} GB/s"
        name = name.replace("_", "-")
        if measured["right"]:
            findings.append(Finding("measured exchange", name, OK, found))
        else:
            remedy = "the connection damages data: try NCCL_P2P_DISABLE=1 or GLOO_SOCKET_IFNAME, and have it repaired"
            findings.append(Finding("measured exchange", name, WRONG, "what arrived is not what was sent", remedy))
    return findings


def _numbers(trial: Trial, ended: Ended, first: Outcome | None, expected, on_cpu: bool) -> dict:
    return {
        "ranks": trial.layout.ranks,
        "on_cpu": on_cpu,
        "layout": trial.describe(),
        "seconds": round(ended.seconds, 1),
        "losses": None if first is None else first.losses,
        "grad_norms": None if first is None else first.norms,
        "losses_of_one_process": expected.losses,
        "grad_norms_of_one_process": expected.grad_norms,
        "exchange": None if first is None else first.exchange,
        "last_lines": ended.last_lines if ended.error else [],
    }


def _in_words(phase: str) -> str:
    for begin, words in _SAID.items():
        phase = phase.replace(begin, words)
    return f"self-test: {phase}"
