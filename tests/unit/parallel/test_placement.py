"""When a run is told that its expert-parallel groups reach across machines."""

import logging

import pytest

from moe_hf.parallel import placement


@pytest.fixture
def warnings_of(monkeypatch, caplog):
    def collect(ep_size, world_size, local=8, variable="LOCAL_SIZE", rank=0, **config) -> list[str]:
        for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        if variable:
            monkeypatch.setenv(variable, str(local))
        monkeypatch.setenv("RANK", str(rank))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            section = {"expert_parallel": {"enabled": True, "autoep_size": ep_size}}
            placement.warn_of_groups_across_machines(config | section, world_size)
        return caplog.messages

    return collect


@pytest.mark.parametrize(("ep_size", "world_size", "local"), [(8, 16, 8), (4, 16, 8), (1, 3, 1), (2, 12, 6), (8, 8, 8)])
def test_groups_within_machines_need_no_word(warnings_of, ep_size, world_size, local):
    assert warnings_of(ep_size, world_size, local) == []


@pytest.mark.parametrize("variable", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize(
    ("ep_size", "world_size", "local", "better"), [(16, 16, 8, 8), (2, 2, 1, 1), (4, 12, 6, 2), (16, 32, 4, 4)]
)
def test_groups_across_machines_are_told(warnings_of, ep_size, world_size, local, better, variable):
    (said,) = warnings_of(ep_size, world_size, local, variable)
    assert said.startswith(f"expert_parallel_size={ep_size} with {local} processes on each machine")
    assert said.endswith(f"{better} would stay within one.")


def test_groups_that_are_strided_over_machines_are_told(warnings_of):
    (said,) = warnings_of(8, 16, use_data_before_expert_parallelism=True)
    assert said.endswith("delete use_data_before_expert_parallelism.")
    assert warnings_of(8, 8, use_data_before_expert_parallelism=True) == []


def test_nothing_is_said_twice_or_guessed(warnings_of):
    assert warnings_of(16, 16, rank=1) == []
    assert warnings_of(16, 16, variable=None) == []
