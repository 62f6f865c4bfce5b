"""Which process this is, and one error for all, without a process group."""

import pytest
import torch.distributed as dist

from moe_hf.errors import ConfigError, DataError
from moe_hf.parallel import processes
from moe_hf.parallel.processes import raise_together, rank, world_size


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_process():
    assert (rank(), world_size()) == (0, 1)


def test_launcher_tells_rank_and_size_before_there_is_a_group(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert not dist.is_initialized()
    assert (rank(), world_size()) == (3, 8)
    monkeypatch.setenv("RANK", "5")
    assert rank() == 5


def test_error_of_the_only_process_is_raised_as_it_is():
    error = ConfigError("hidden_size=0 must be at least 1.")
    with pytest.raises(ConfigError) as met:
        raise_together(error)
    assert met.value is error
    assert raise_together(None) is None


def test_before_there_is_a_group_nobody_is_asked(monkeypatch):
    """A launcher has started others, but nothing connects them yet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert raise_together(None) is None
    with pytest.raises(DataError, match="mine"):
        raise_together(DataError("mine"))


@pytest.mark.parametrize(
    ("everyones", "first"),
    [([None, None, None], None), ([None, "b", "c"], "b"), (["a", None, "c"], "a"), ([None, None, "c"], "c")],
)
def test_error_of_the_lowest_rank_is_everyones(monkeypatch, everyones, first):
    errors = [text and DataError(text) for text in everyones]

    def gather(found: list, own) -> None:
        assert own is errors[1]
        found[:] = errors

    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(processes.dist, "all_gather_object", gather)
    if first is None:
        raise_together(errors[1])
    else:
        with pytest.raises(DataError, match=f"^{first}$"):
            raise_together(errors[1])
