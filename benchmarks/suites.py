"""The order of the suites."""

import argparse
from collections.abc import Iterable, Iterator

import torch

from moe_hf.errors import ConfigError

from .cases import FAMILIES, layer_cases, names_of_cases, step_cases
from .engine_suite import engine_cases, run_engines
from .layer_suite import run_layers
from .peers.registry import choose, layer_peers, model_peers
from .profile_suite import run_layer_profiles, run_step_profiles
from .results import Row
from .scaling_suite import AUTO, run_scaling
from .step_suite import run_steps
from .watching import LoadWatch

TIMED = {"layer", "step", "scaling", "profile"}
"""Suites whose results depend on what else runs."""


def run_suites(arguments: argparse.Namespace, device: str, watch: LoadWatch) -> Iterator[Row]:
    """Run what the arguments name; yield rows as they are done.

    Args:
        arguments: of the command line.
        device: `"cpu"` or `"cuda"`.
        watch: looks after the machine while times are taken.

    Raises:
        UserError: a name that no suite knows, or a busy machine.
    """
    suites, names, num_rounds = set(arguments.suite), arguments.peers, arguments.rounds
    _check_known("--config", arguments.config, names_of_cases(device, suites))
    _check_known("--peers", names, _peer_names(suites))
    if device == "cpu":
        torch.set_num_threads(1)
    if TIMED & suites:
        watch.look()
    if "layer" in suites:
        cases = layer_cases(device, arguments.config)
        yield from run_layers(cases, choose(layer_peers(), names), device, num_rounds, watch)
    if "step" in suites:
        cases = step_cases(device, arguments.config)
        yield from run_steps(cases, lambda f: choose(model_peers(f), names), device, num_rounds, watch)
    if engines := suites & {"memory", "comm"}:
        yield from run_engines(engine_cases(), engines)
    if "scaling" in suites:
        layers, models = (choose(peers, names or AUTO) for peers in (layer_peers(), model_peers("mixtral")))
        yield from run_scaling(layers, models, device, num_rounds, watch)
    if "profile" in suites:
        names = names or AUTO
        cases, peers = layer_cases(device, arguments.config), choose(layer_peers(), names)
        yield from run_layer_profiles(cases, peers, device, num_rounds, watch)
        cases = step_cases(device, arguments.config)
        yield from run_step_profiles(cases, lambda f: choose(model_peers(f), names), device, num_rounds, watch)


def _peer_names(suites: set[str]) -> list[str]:
    peers = layer_peers() if suites & {"layer", "scaling", "profile"} else []
    if suites & {"step", "scaling", "profile"}:
        peers += [peer for family in FAMILIES for peer in model_peers(family)]
    return list(dict.fromkeys(peer.name for peer in peers))


def _check_known(flag: str, names: Iterable[str] | None, known: list[str]) -> None:
    for name in names or ():
        if name not in known:
            raise ConfigError(f"{flag} {name} is not known in these suites; there are auto, {', '.join(known)}.")
