"""How a program ends is told by its exit code, and by one sentence; what is nobody's mistake keeps its traceback."""

import pytest

from moe_hf.errors import DataError
from moe_hf.training import launch
from moe_hf.training.preemption import Preempted


class Relay:
    """Notes what is asked of it."""

    made: list["Relay"]

    def __init__(self) -> None:
        self.calls = []
        Relay.made.append(self)

    def stop(self) -> None:
        self.calls.append("stop")

    def exit(self, sentence: str) -> None:
        self.calls.append(f"exit: {sentence}")

    def await_end_if_told(self) -> None:
        self.calls.append("await")


@pytest.fixture(autouse=True)
def relays(monkeypatch) -> list[Relay]:
    Relay.made = []
    monkeypatch.setattr(launch, "FailureRelay", Relay)
    return Relay.made


def program_that_raises(error: BaseException | None):
    def program(argv, relay, description):
        assert argv == ["a"] and description == "d"
        if error is not None:
            raise error

    return program


def test_program_that_ends_well(relays):
    launch.run(program_that_raises(None), ["a"], "d")
    assert relays[0].calls == ["stop"]


@pytest.mark.parametrize("rank", [0, 1])
def test_preempted_run_ends_with_its_own_exit_code(relays, monkeypatch, capsys, rank):
    """The others are told that this is no failure before the first process goes, and rank 0 says why."""
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as ended:
        launch.run(program_that_raises(Preempted("Stopped by SIGTERM.")), ["a"], "d")
    assert ended.value.code == 75
    assert relays[0].calls == ["stop"]
    assert capsys.readouterr().err == ("Stopped by SIGTERM.\n" if rank == 0 else "")


def test_mistake_of_the_user_is_told_as_one_line(relays):
    launch.run(program_that_raises(DataError("The file\n  is empty.")), ["a"], "d")
    assert relays[0].calls == ["exit: The file is empty."]


def test_anything_else_keeps_its_traceback(relays):
    with pytest.raises(ZeroDivisionError):
        launch.run(program_that_raises(ZeroDivisionError()), ["a"], "d")
    assert relays[0].calls == ["await"]
