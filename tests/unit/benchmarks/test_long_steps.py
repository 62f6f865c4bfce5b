"""Steps as on a GPU: of several micro-batches, of models as large as memory holds, two by two, cut off by time."""

from dataclasses import replace

import pytest
import torch
from small_steps import CASE, prepare

from benchmarks import step_equality, step_suite
from benchmarks.cases import FAMILIES, step_cases
from benchmarks.engines import Training, start
from benchmarks.equality import Different
from benchmarks.peers.models import OurModel, TransformersModel, our_config
from benchmarks.peers.registry import model_peers
from benchmarks.results import FAILED, MEASURED
from benchmarks.step_equality import Expected, check_gradients, check_losses, make_tokens, make_weights
from benchmarks.step_suite import count_step, run_steps, side_by_side, that_fits
from benchmarks.timing import Rounds
from moe_hf.planning.flops import flops_per_token

pytestmark = pytest.mark.usefixtures("alone")


def with_memory(monkeypatch, gib: float) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, int(gib * 2**30)))


def test_steps_of_a_gpu_are_long_and_of_one_family():
    cases = step_cases("cuda")
    assert [(case.name, case.family) for case in cases] == [("a", "mixtral"), ("b", "olmoe"), ("c", "qwen3_moe")]
    for case, tokens in zip(cases, (2**16, 2**17, 2**17), strict=True):
        assert case.tokens >= tokens and (case.micro_tokens >= 2**15 or case.name == "b")
    assert all(case.accumulation == 1 for case in step_cases("cpu"))
    assert {case.family for case in step_cases("cpu")} == set(FAMILIES)


@pytest.mark.parametrize(
    "gib, layers, micro_batches",
    [(139.8, [12, 7, 16], [2**15, 2**13, 2**15]), (79, [12, 4, 16], [2**13] * 3), (3, [1, 1, 1], [2**13] * 3)],
)
def test_models_are_as_large_as_memory_holds_twice(monkeypatch, gib, layers, micro_batches):
    with_memory(monkeypatch, gib)
    cases = [that_fits(case, "cuda") for case in step_cases("cuda")]
    assert [case.layers for case in cases] == layers
    assert [case.micro_tokens for case in cases] == micro_batches
    assert [case.tokens for case in cases] == [case.tokens for case in step_cases("cuda")]
    for case in cases if gib > 3 else ():
        held = (2 * 16 + 2) * case.parameters + case.activation_bytes
        assert held <= 0.9 * gib * 2**30
        # A micro-batch, with the logits in 16 and twice in 32 bits, is held too.
        assert case.activation_bytes > case.micro_tokens * (10 * case.vocab_size + 30 * case.layers * case.hidden_size)


def test_as_many_are_trained_side_by_side_as_memory_holds(monkeypatch):
    case = step_cases("cuda")[0]
    peers = model_peers("mixtral")[:5]
    names = [peer.name for peer in peers]
    for gib, groups in (
        (160, [names[:3], [names[0], *names[3:]]]),
        (140, [[names[0], other] for other in names[1:]]),
        (400, [names]),
    ):
        with_memory(monkeypatch, gib)
        assert [[peer.name for peer in group] for group in side_by_side(peers, case, "cuda")] == groups
    with_memory(monkeypatch, 79)
    assert side_by_side(peers[:1], case, "cuda") == [peers[:1]]


ACCUMULATED = replace(CASE, accumulation=3)


def test_a_step_of_several_micro_batches_is_that_of_all_tokens_at_once():
    weights, tokens, expected = prepare(ACCUMULATED)
    assert tokens.shape == (6, 24) and ACCUMULATED.tokens == 6 * 24 and ACCUMULATED.micro_tokens == 2 * 24
    peer = TransformersModel("peer", "grouped_mm")
    assert max(check_gradients(peer, CASE, weights, tokens, expected, "cpu").values()) <= 1e-5
    training = start(peer, ACCUMULATED, weights, tokens)
    assert max(check_losses(training, expected.losses, 1e-3).values()) > 0
    assert training.engine.global_steps == len(expected.losses)
    training.end()
    # What a step of one micro-batch learns is something else.
    training = start(peer, CASE, weights, tokens[:2])
    with pytest.raises(Different):
        check_losses(training, expected.losses, 1e-3)
    training.end()


class CountingEngine:
    """Stands for a model in an engine; a clock's mark counts what it was asked for."""

    def __init__(self) -> None:
        self.calls = []

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls.append(("forward", len(tokens)))
        return tokens.float().mean()

    def backward(self, loss: torch.Tensor) -> None:
        self.calls.append(("backward", float(loss)))

    def step(self) -> None:
        self.calls.append(("step",))


class Directly(TransformersModel):
    """Hands tokens to the engine."""

    def loss(self, model, tokens):
        return model(tokens)


def test_times_of_a_step_are_those_of_all_micro_batches(monkeypatch):
    tokens = torch.tensor([[1.0], [2.0], [6.0], [7.0]])
    engine = CountingEngine()
    monkeypatch.setattr("benchmarks.timing.CpuClock.milliseconds", lambda self: [3.0, 10.0, 14.0, 20.0, 21.0])
    times, loss = Training(Directly("peer", "eager"), engine, tokens, batch=2).step()
    assert times == {"forward_ms": 3.0 + 4.0, "forward_backward_ms": 20.0, "step_ms": 21.0}
    assert float(loss) == 4.0
    of_one = [("forward", 2), ("backward", 1.5), ("step",)]
    assert engine.calls == [*of_one, ("forward", 2), ("backward", 6.5), ("step",)]


def test_a_long_step_is_checked_in_two_micro_batches_and_timed_whole(monkeypatch):
    timed, checked = [], []
    whole, gate = Training.step, step_equality.check_losses
    monkeypatch.setattr(Training, "step", lambda self: timed.append(len(self.tokens)) or whole(self))
    monkeypatch.setattr(step_equality, "check_losses", lambda t, *rest: checked.append(len(t.tokens)) or gate(t, *rest))
    peers = [OurModel("ours"), TransformersModel("peer", "eager")]
    ours, peer, matmul = run_steps([ACCUMULATED], lambda family: peers, "cpu", num_rounds=1)
    assert checked == [4, 4] and timed == [4] * 3 + [4] * 3 + [6] * 6
    assert {"forward_ms", "forward_backward_ms", "step_ms"} == set(peer.ratios)
    for row in (ours, peer):
        assert row.values["tokens_per_second"] == pytest.approx(6 * 24e3 / row.values["step_ms"])
    assert matmul.values["tflops"] == pytest.approx(
        6 * 24 * flops_per_token(our_config(CASE), 24).total / matmul.values["step_ms"] / 1e9
    )


def test_synchronisations_are_those_of_all_micro_batches():
    class Waiting(Directly):
        def loss(self, model, tokens):
            tokens.max().item()
            return super().loss(model, tokens)

    class Engine(CountingEngine, torch.nn.Linear):
        """Waits twice where it takes its step, with every second micro-batch."""

        def __init__(self) -> None:
            torch.nn.Linear.__init__(self, 1, 1)
            CountingEngine.__init__(self)

        __call__, module, optimizer = CountingEngine.__call__, None, None

        def step(self) -> None:
            super().step()
            if len(self.calls) % 6 == 0:
                torch.ones(1).item(), torch.ones(1).item()

        def backward(self, loss: torch.Tensor) -> None:
            self.calls.append(("backward",))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("weights_of", "gradients_of", "optimizer_states_of"):
            patch.setattr(step_suite, name, lambda engine: [])
        training = Training(Waiting("peer", "eager"), Engine(), torch.ones(4, 1), batch=2)
        assert count_step(training, 2)["synchronisations"] == 2 + 2
        assert count_step(training, 16)["synchronisations"] == 16 + 2


def test_who_is_timed_again_beside_another_keeps_its_first_times(monkeypatch):
    """Ours and the ceiling; the ratios are those of each pair."""
    monkeypatch.setattr(step_suite, "side_by_side", lambda peers, *_: [[peers[0], other] for other in peers[1:]])
    given = iter([{"ours": 10.0, "first": 20.0, "matmul": 5.0}, {"ours": 40.0, "second": 60.0, "matmul": 8.0}])

    def rounds_of(contestants, num_rounds, watch) -> Rounds:
        rounds, times = Rounds(list(contestants)), next(given)
        names = ("forward_ms", "forward_backward_ms", "step_ms")
        rounds.add({name: dict.fromkeys(names, times[name]) for name in contestants})
        return rounds

    monkeypatch.setattr(step_suite, "interleave", rounds_of)
    peers = [OurModel("ours"), TransformersModel("first", "eager"), TransformersModel("second", "grouped_mm")]
    ours, first, second, matmul = run_steps([CASE], lambda family: peers, "cpu", num_rounds=1)
    assert [row.values["step_ms"] for row in (ours, first, second, matmul)] == [10.0, 20.0, 60.0, 5.0]
    assert [row.values["ceiling_share"] for row in (ours, first, second)] == [5 / 10, 5 / 20, 8 / 60]
    assert [row.ratios["step_ms"].median for row in (first, second, matmul)] == [2.0, 1.5, 0.5]


def test_who_does_not_fit_beside_ours_leaves_the_others(monkeypatch):
    monkeypatch.setattr(step_suite, "side_by_side", lambda peers, *_: [[peers[0], other] for other in peers[1:]])

    class Large(TransformersModel):
        """Fits alone, not beside another."""

        starts = 0

        def load(self, case, weights, device):
            self.starts += 1
            if self.starts > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().load(case, weights, device)

    peers = [OurModel("ours"), Large("large", "eager"), TransformersModel("peer", "eager")]
    ours, large, peer, _ = run_steps([CASE], lambda family: peers, "cpu", num_rounds=1)
    assert (ours.status, large.status, peer.status) == (MEASURED, FAILED, MEASURED)
    assert "memory does not hold" in large.reason and "step_ms" in ours.values and "step_ms" in peer.values


def test_what_is_timed_before_the_end_of_time_is_told(monkeypatch):
    monkeypatch.setattr(step_suite, "side_by_side", lambda peers, *_: [[peers[0], other] for other in peers[1:]])

    class Interrupted(TransformersModel):
        """Is stopped while it is timed."""

        def cross_entropy(self, model, tokens):
            if stopping:
                raise KeyboardInterrupt
            return super().cross_entropy(model, tokens)

    stopping, time = [], step_suite._time

    def timed(peers, *rest) -> None:
        stopping.extend(peer for peer in peers if isinstance(peer, Interrupted))
        time(peers, *rest)

    monkeypatch.setattr(step_suite, "_time", timed)
    peers = [OurModel("ours"), TransformersModel("peer", "eager"), Interrupted("late", "eager")]
    rows = []
    with pytest.raises(KeyboardInterrupt):
        rows.extend(run_steps([CASE], lambda family: peers, "cpu", num_rounds=1))
    assert [row.peer for row in rows] == ["ours", "peer", "matmul"]
    assert all(row.values["step_ms"] > 0 for row in rows)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradients_of_the_reference_are_asked_for_on_a_cpu_only(monkeypatch, device):
    """`meta` stands for the GPU."""
    asked, place = [], "cpu" if device == "cpu" else "meta"

    def expected(*_, with_gradients: bool) -> None:
        asked.append(with_gradients)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_equality, "Expected", expected)
    monkeypatch.setattr(step_suite, "that_fits", lambda case, device: case)
    monkeypatch.setattr(step_suite, "make_weights", lambda case, device: {})
    monkeypatch.setattr(step_suite, "make_tokens", lambda case, device: torch.zeros(2, 24, device=place))
    peers = [OurModel("ours"), TransformersModel("peer", "eager")]
    rows = list(run_steps([CASE], lambda family: peers, device, num_rounds=1))
    assert asked == [device == "cpu"] and {row.status for row in rows} == {FAILED}
    monkeypatch.undo()
    weights, tokens = make_weights(CASE, "cpu"), make_tokens(CASE, "cpu")
    assert not Expected(CASE, weights, tokens, with_gradients=False).gradients


def test_weights_stay_on_a_gpu_in_the_precision_of_training():
    """`meta` stands for it: no memory, so nothing can be copied to a CPU."""
    weights = make_weights(CASE, "meta")
    assert {(weight.device.type, weight.dtype) for weight in weights.values()} == {("meta", torch.bfloat16)}
    assert {weight.dtype for weight in make_weights(CASE, "cpu").values()} == {torch.float32}
