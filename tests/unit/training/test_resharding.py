"""A run goes on elsewhere in the data and in the schedule than it would if this were forgotten."""

import copy
import errno
import re

import pytest
import torch
from deepspeed_files import (
    Run,
    correction_biases,
    disk_that_holds,
    draw_states,
    live_model,
    loss_free,
    write_checkpoint,
)
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from transformers import get_scheduler

from moe_hf.checkpoint.universal import TAG
from moe_hf.errors import CheckpointError, ConfigError
from moe_hf.training import resharding
from moe_hf.training.position import place_in_data
from moe_hf.training.resharding import continue_schedule, load_resharded

# --------------------------------------------------------------------------------------------------------------------
# The place in the data


@pytest.mark.parametrize(
    ("samples_seen", "rows_per_epoch", "global_batch_size", "accumulation_steps", "place"),
    [
        (0, 100, 4, 1, (0, 0)),
        (12, 100, 4, 1, (0, 3)),
        (12, 100, 4, 2, (0, 6)),
        (12, 100, 2, 1, (0, 6)),
        (12, 100, 12, 3, (0, 3)),
        (100, 100, 4, 1, (1, 0)),
        (112, 100, 4, 4, (1, 12)),
        (312, 100, 6, 1, (3, 2)),
        (30, 10, 7, 1, (3, 0)),  # between epochs any size will do
        (112, None, 4, 2, (0, 56)),
        (0, None, 7, 3, (0, 0)),
    ],
)
def test_place_in_data(samples_seen, rows_per_epoch, global_batch_size, accumulation_steps, place):
    assert place_in_data(samples_seen, rows_per_epoch, global_batch_size, accumulation_steps) == place


def test_place_in_data_is_where_counting_comes_to():
    """Row by row: the micro-batches that cover what was seen of the last epoch."""
    rows_per_epoch = 24
    for before, now, accumulation in ((4, 8, 2), (8, 4, 1), (6, 12, 3), (12, 6, 2)):
        for steps in range(1, 14):
            rows = steps * before
            epochs, skipped, left = 0, 0, rows
            while left >= rows_per_epoch:
                epochs, left = epochs + 1, left - rows_per_epoch
            micro_batch = now // accumulation
            while left > 0:
                skipped, left = skipped + 1, left - micro_batch
            if left == 0 and skipped % accumulation == 0:
                assert place_in_data(rows, rows_per_epoch, now, accumulation) == (epochs, skipped)
            else:
                with pytest.raises(ConfigError):
                    place_in_data(rows, rows_per_epoch, now, accumulation)


@pytest.mark.parametrize(("seen", "per_epoch", "rows"), [(12, 100, 12), (112, 100, 12), (12, None, 12), (199, 100, 99)])
def test_a_place_inside_a_step_is_refused(seen, per_epoch, rows):
    with pytest.raises(ConfigError) as caught:
        place_in_data(seen, per_epoch, 8, 2)
    assert str(caught.value) == (
        f"The checkpoint stopped {rows} rows into an epoch, which is not a multiple of this run's 8 rows for each "
        "step; change --gradient_accumulation_steps or --per_device_train_batch_size so that it is, and no row is "
        "repeated or skipped."
    )


# --------------------------------------------------------------------------------------------------------------------
# The schedule

SCHEDULES = {
    "linear": {"num_warmup_steps": 4, "num_training_steps": 20},
    "cosine": {"num_warmup_steps": 5, "num_training_steps": 20},
    "cosine_with_restarts": {
        "num_warmup_steps": 3,
        "num_training_steps": 20,
        "scheduler_specific_kwargs": {"num_cycles": 3},
    },
    "cosine_with_min_lr": {
        "num_warmup_steps": 3,
        "num_training_steps": 20,
        "scheduler_specific_kwargs": {"min_lr_rate": 0.1},
    },
    "polynomial": {"num_warmup_steps": 3, "num_training_steps": 20},
    "inverse_sqrt": {"num_warmup_steps": 3},
    "constant": {},
    "constant_with_warmup": {"num_warmup_steps": 6},
    "warmup_stable_decay": {
        "num_warmup_steps": 4,
        "num_training_steps": 20,
        "scheduler_specific_kwargs": {"num_decay_steps": 8},
    },
    "reduce_lr_on_plateau": {"scheduler_specific_kwargs": {"patience": 1, "factor": 0.37, "min_lr": 1e-7}},
}
# Losses that fall, stay, and fall again: the rate is cut before and after any place to stop at.
LOSSES = [5.0, 4.0, 4.0, 4.0, 4.1, 3.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
CROSSINGS = [(2, 3), (3, 2), (2, 4), (2, 2)]


def optimizer_of(num_groups: int, rates: list[float] | None = None) -> torch.optim.Optimizer:
    rates = rates or [3e-4] * num_groups
    return torch.optim.AdamW(
        [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates], lr=rates[0]
    )


def scheduler_of(name: str, optimizer: torch.optim.Optimizer):
    return get_scheduler(name, optimizer, **copy.deepcopy(SCHEDULES[name]))


def advance(scheduler, optimizer, step: int) -> list[float]:
    """Make one step and return the rates that the next one uses."""
    optimizer.step()
    scheduler.step(LOSSES[step]) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("stop", [1, 3, 7, 12])
@pytest.mark.parametrize(("before", "now"), CROSSINGS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_goes_on_as_if_never_stopped(name, before, now, stop):
    whole_optimizer = optimizer_of(now)
    whole = scheduler_of(name, whole_optimizer)
    expected = [advance(whole, whole_optimizer, step) for step in range(20)]
    assert name == "constant" or len({tuple(rates) for rates in expected}) > 2

    first_optimizer = optimizer_of(before)
    first = scheduler_of(name, first_optimizer)
    for step in range(stop):
        advance(first, first_optimizer, step)
    saved = copy.deepcopy(first.state_dict())

    optimizer = optimizer_of(now)
    scheduler = scheduler_of(name, optimizer)
    continue_schedule(scheduler, optimizer, saved)
    assert [group["lr"] for group in optimizer.param_groups] == expected[stop - 1]
    assert scheduler.get_last_lr() == expected[stop - 1]
    assert [advance(scheduler, optimizer, step) for step in range(stop, 20)] == expected[stop:]
    # And what is saved next has an entry for each of these groups.
    state = scheduler.state_dict()
    assert all(len(value) == now for value in state.values() if isinstance(value, list))


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_groups_with_rates_of_their_own(name):
    """The experts' group is split from one that may have its own rate."""
    rates = [1e-3, 2e-4, 1e-3]
    whole_optimizer = optimizer_of(3, rates)
    whole = scheduler_of(name, whole_optimizer)
    expected = [advance(whole, whole_optimizer, step) for step in range(15)]
    first_optimizer = optimizer_of(2, rates[:2])
    first = scheduler_of(name, first_optimizer)
    for step in range(6):
        advance(first, first_optimizer, step)
    optimizer = optimizer_of(3, rates)
    scheduler = scheduler_of(name, optimizer)
    continue_schedule(scheduler, optimizer, copy.deepcopy(first.state_dict()))
    assert [advance(scheduler, optimizer, step) for step in range(6, 15)] == expected[6:]


def test_a_schedule_of_another_kind():
    """Where all groups have one rate it goes on; where they do not, nobody knows whose is whose."""
    first_optimizer, optimizer, whole_optimizer = optimizer_of(2), optimizer_of(3), optimizer_of(3)
    first, scheduler, whole = (StepLR(o, 3, 0.5) for o in (first_optimizer, optimizer, whole_optimizer))
    expected = [advance(whole, whole_optimizer, step) for step in range(12)]
    for step in range(5):
        advance(first, first_optimizer, step)
    continue_schedule(scheduler, optimizer, copy.deepcopy(first.state_dict()))
    assert [advance(scheduler, optimizer, step) for step in range(5, 12)] == expected[5:]

    first_optimizer = optimizer_of(2, [1e-3, 1e-4])
    first = StepLR(first_optimizer, 3, 0.5)
    optimizer = optimizer_of(3)
    with pytest.raises(CheckpointError, match=r"A StepLR cannot continue with 3 optimizer groups instead of 2; resume"):
        continue_schedule(StepLR(optimizer, 3, 0.5), optimizer, first.state_dict())


# --------------------------------------------------------------------------------------------------------------------
# The state

CONFIG = loss_free(num_hidden_layers=2)


class Engine:
    """As DeepSpeed's at ZeRO 0 in float32, where the engine's optimizer is the base optimizer."""

    def __init__(self, optimizer: type = torch.optim.AdamW) -> None:
        self.module = live_model(CONFIG, seed=9)
        params = list(self.module.parameters())
        matrices, vectors = [p for p in params if p.dim() > 1], [p for p in params if p.dim() == 1]
        self.optimizer = optimizer([{"params": matrices}, {"params": vectors}], lr=1e-3)
        self.global_steps = self.global_samples = self.skipped_steps = 0

    def zero_optimization_stage(self) -> int:
        return 0


@pytest.fixture
def saved():
    model = live_model(CONFIG)
    return model, draw_states(model)


@pytest.fixture
def checkpoint(tmp_path, saved):
    return write_checkpoint(tmp_path / "checkpoint-3", Run(4, 3, 2, bf16=True), *saved)


def test_the_state_of_another_layout(checkpoint, saved, capsys):
    model, states = saved
    engine = Engine()
    load_resharded(engine, checkpoint, expert_parallel=False)
    for name, param in engine.module.named_parameters():
        assert torch.equal(param, states["fp32"][name])
        assert torch.equal(engine.optimizer.state[param]["exp_avg"], states["exp_avg"][name])
    for name, bias in correction_biases(model).items():
        assert torch.equal(engine.module.state_dict()[name], bias)
    assert engine.global_steps == 3
    assert "converting checkpoint-3" in capsys.readouterr().err
    assert sorted(path.name for path in checkpoint.iterdir() if path.name.startswith(("universal", "."))) == [
        "universal"
    ]


def test_it_is_converted_once_for_each_kind_of_engine(checkpoint, monkeypatch):
    converted = []
    write = resharding.write_universal

    def watched(source, folder, **options):
        converted.append(folder.name)
        write(source, folder, **options)

    monkeypatch.setattr(resharding, "write_universal", watched)
    monkeypatch.setattr(resharding, "load_universal", lambda engine, folder, tag, buffers: None)
    for expert_parallel in (False, True, False, True):
        load_resharded(Engine(), checkpoint, expert_parallel=expert_parallel)
    assert converted == ["universal", "universal_autoep"]


def test_rank_0_converts(checkpoint, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(FileNotFoundError):  # in a run, it would be there: rank 0 has made it by then
        load_resharded(Engine(), checkpoint, expert_parallel=False)
    assert not list(checkpoint.glob("*universal*"))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_optimizer_with_other_states_is_refused(checkpoint, depth):
    engine = Engine(torch.optim.Adagrad)
    for _ in range(depth):
        engine.optimizer = type("Wrapper", (), {"optimizer": engine.optimizer})()
    with pytest.raises(ConfigError) as caught:
        load_resharded(engine, checkpoint, expert_parallel=False)
    assert str(caught.value) == (
        "The optimizer Adagrad cannot continue from a checkpoint of another layout; use --optim adamw_torch, or "
        "--reset_optimizer to start from the weights only."
    )
    assert not list(checkpoint.glob("*universal*"))


def test_a_checkpoint_with_other_states_is_refused(checkpoint):
    for path in (checkpoint / "global_step3").glob("*optim_states.pt"):
        content = torch.load(path, weights_only=False)
        adam = content["optimizer_state_dict"]["optimizer_state_dict"]["state"]
        for state in adam.values():
            state["square_avg"] = state.pop("exp_avg_sq")
        torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        load_resharded(Engine(), checkpoint, expert_parallel=False)
    assert str(caught.value) == (
        f"{checkpoint} has no exp_avg_sq, so it was written with an optimizer whose states cannot be converted to "
        "another layout; add --reset_optimizer to start from its weights only."
    )
    assert not list(checkpoint.glob("*universal*"))


def test_a_damaged_checkpoint_is_told_and_leaves_no_conversion(checkpoint):
    lost = next((checkpoint / "global_step3").glob("*rank_2_mp_rank_00_optim_states.pt"))
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name.removeprefix("bf16_")):
        load_resharded(Engine(), checkpoint, expert_parallel=False)
    assert not (checkpoint / "universal").exists()


def test_a_full_disk_is_told_and_leaves_no_conversion(checkpoint, saved):
    engine = Engine()
    with disk_that_holds(3000), pytest.raises(CheckpointError) as caught:
        load_resharded(engine, checkpoint, expert_parallel=False)
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)
    assert not (checkpoint / "universal").exists()
    load_resharded(engine, checkpoint, expert_parallel=False)
    assert torch.equal(engine.module.lm_head.weight, saved[1]["fp32"]["lm_head.weight"])
    assert (checkpoint / "universal" / TAG).is_dir()


def test_a_system_that_cannot_write_is_told(checkpoint, monkeypatch):
    def unwritable(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(resharding, "write_universal", unwritable)
    with pytest.raises(CheckpointError, match=re.escape(str(checkpoint)) + ".*Permission denied"):
        load_resharded(Engine(), checkpoint, expert_parallel=False)
