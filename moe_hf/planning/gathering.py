"""How often ZeRO 3 puts each weight together, and how many are together at one time.

DeepSpeed fetches a module's weights before it runs, some of those that follow, and lets go of them afterwards unless
they come again soon (`partitioned_param_coordinator.py`). All that follows from the order of the modules, so one
micro-batch is walked through here by the same rules, on sizes alone.
"""

import itertools
from collections import Counter, deque
from dataclasses import dataclass

from ..configuration_moe import MoEConfig
from .module_order import Unfinished, modules_in_order
from .parameters import Parameter
from .setting import Setting
from .states import persistent


@dataclass(frozen=True)
class Gathering:
    """What ZeRO 3 gathers in one micro-batch.

    Args:
        times: how often each parameter is gathered, by its name; persistent ones are not, but once for each step.
        live: the most elements that are whole at one time, besides persistent ones.
        largest: the most elements that are gathered in one call.
    """

    times: dict[str, int]
    live: int
    largest: int


def gathering(parameters: list[Parameter], config: MoEConfig, setting: Setting) -> Gathering:
    """Walk through one micro-batch of a run that has seen the order of its modules before.

    Args:
        parameters: of `local_parameters`.
        config: of the model.
        setting: how it is trained, at ZeRO 3.
    """
    kept = {p.name for p in persistent([parameters], setting)}
    return _walk(modules_in_order(parameters, config, setting), kept, setting)


def _walk(uses: list[list[Parameter]], kept: set[str], setting: Setting) -> Gathering:
    zero = setting.zero
    passed = [0, *itertools.accumulate(sum(p.numel for p in use) for use in uses)]
    next_use = _next_uses(uses)
    waiting = deque((p, step) for step, use in enumerate(uses) for p in use)
    seen_until: dict[str, int] = {}
    whole: dict[str, int] = {}
    times, live, largest = Counter(), 0, 0
    for step, use in enumerate(uses):
        fetched = _fetch([p for p in use if p.name not in kept], whole, times)
        unseen = {p.name for p in use if seen_until.get(p.name, -1) < step}
        passed_by: set[str] = set()
        while waiting and len(passed_by) < len(unseen):
            parameter, last = waiting.popleft()
            seen_until[parameter.name] = last
            passed_by.add(parameter.name)
        ahead, size = [], 0
        room = min(zero.max_live_parameters - sum(whole.values()), zero.prefetch_bucket_size)
        while waiting and size < room:
            parameter, last = waiting.popleft()
            seen_until[parameter.name] = max(seen_until.get(parameter.name, -1), last)
            if parameter.name not in whole and parameter.name not in kept and parameter not in ahead:
                ahead.append(parameter)
                size += parameter.numel
        largest = max(largest, fetched, _fetch(ahead, whole, times))
        live = max(live, sum(whole.values()))
        for p in use if not isinstance(use, Unfinished) else ():
            after = next_use[step, p.name]
            comes_soon = after is not None and passed[after] - passed[step + 1] < zero.max_reuse_distance
            if not comes_soon and seen_until.get(p.name, -1) <= step + 1:
                whole.pop(p.name, None)
    return Gathering(dict(times), live, largest)


def _fetch(parameters: list[Parameter], whole: dict[str, int], times: Counter) -> int:
    missing = [p for p in parameters if p.name not in whole]
    for p in missing:
        whole[p.name] = p.numel
        times[p.name] += 1
    return sum(p.numel for p in missing)


def _next_uses(uses: list[list[Parameter]]) -> dict[tuple[int, str], int | None]:
    following, found = {}, {}
    for step in reversed(range(len(uses))):
        for p in uses[step]:
            found[step, p.name] = following.get(p.name)
        for p in uses[step]:
            following[p.name] = step
    return found
