"""The order of the suites."""

import argparse
from collections.abc import Iterable

import torch

from moe_hf.errors import ConfigError

from .cases import FAMILIES, layer_cases, names_of_cases, step_cases
from .engine_suite import engine_cases, run_engines
from .layer_suite import run_layers
from .peers.models import model_peers
from .peers.registry import choose, layer_peers
from .results import Row
from .scaling_suite import AUTO, run_scaling
from .step_suite import run_steps
from .watching import LoadWatch

TIMED = {"layer", "step", "scaling"}
"""Suites whose results depend on what else runs."""


def run_suites(arguments: argparse.Namespace, device: str) -> tuple[list[Row], bool]:
    """Run what the arguments name; return the rows, and whether their times can be used.

    Raises:
        UserError: a name that no suite knows, or a busy machine.
    """
    suites = set(arguments.suite)
    _check_known("--config", arguments.config, names_of_cases(device, suites))
    _check_known("--peers", arguments.peers, _peer_names(suites))
    if device == "cpu":
        torch.set_num_threads(1)
    watch = LoadWatch(arguments.allow_busy)
    if TIMED & suites:
        watch.look()
    rows: list[Row] = []
    if "layer" in suites:
        peers = choose(layer_peers(), arguments.peers)
        rows += run_layers(layer_cases(device, arguments.config), peers, device, arguments.rounds, watch)
    if "step" in suites:
        cases = step_cases(device, arguments.config)
        rows += run_steps(
            cases, lambda family: choose(model_peers(family), arguments.peers), device, arguments.rounds, watch
        )
    if engines := suites & {"memory", "comm"}:
        rows += run_engines(engine_cases(), engines)
    if "scaling" in suites:
        names = arguments.peers or AUTO
        layers, models = choose(layer_peers(), names), choose(model_peers("mixtral"), names)
        rows += run_scaling(layers, models, device, arguments.rounds, watch)
    return rows, not watch.disturbed


def _peer_names(suites: set[str]) -> list[str]:
    peers = layer_peers() if suites & {"layer", "scaling"} else []
    if suites & {"step", "scaling"}:
        peers += [peer for family in FAMILIES for peer in model_peers(family)]
    return list(dict.fromkeys(peer.name for peer in peers))


def _check_known(flag: str, names: Iterable[str] | None, known: list[str]) -> None:
    for name in names or ():
        if name not in known:
            raise ConfigError(f"{flag} {name} is not known in these suites; there are auto, {', '.join(known)}.")
