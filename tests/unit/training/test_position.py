"""The place in the data is counted in rows of the data, whatever batches and ranks they went to."""

from types import SimpleNamespace

import pytest
import torch

from moe_hf.training.position import DataPosition


def arguments(world_size: int = 2, accumulation: int = 3, per_device: int = 4) -> SimpleNamespace:
    return SimpleNamespace(world_size=world_size, gradient_accumulation_steps=accumulation, train_batch_size=per_device)


def micro_batches(count: int, rows: int) -> list[dict]:
    return [{"input_ids": torch.zeros(rows, 5, dtype=torch.long)} for _ in range(count)]


def steps(position: DataPosition, *sizes: tuple[int, int], ends_epoch: bool = False) -> int:
    """Make steps of `(micro-batches, rows)`, the last of which may end an epoch; return the position."""
    for index, (count, rows) in enumerate(sizes):
        position.read(micro_batches(count, rows))
        position.step(ends_epoch=ends_epoch and index == len(sizes) - 1)
    return position.samples_seen


def test_rows_of_all_ranks_and_micro_batches_count():
    position = DataPosition(range(1000), arguments())
    assert position.samples_seen == 0
    assert position.global_batch_size == 2 * 3 * 4
    assert steps(position, (3, 4), (3, 4), (1, 4)) == 24 + 24 + 8


@pytest.mark.parametrize("last", [(3, 4), (1, 4), (1, 1)])
def test_each_epoch_ends_at_a_multiple_of_its_rows(last):
    """The last batch is filled up to 24 rows (more than there are left), or dropped (fewer)."""
    position = DataPosition(range(41), arguments())
    assert steps(position, (3, 4), last, ends_epoch=True) == 41
    assert steps(position, (3, 4), last, ends_epoch=True) == 82
    assert steps(position, (3, 4)) == 106


def test_filling_up_is_not_counted_before_the_end_is_told():
    assert steps(DataPosition(range(41), arguments()), (3, 4), (3, 4)) == 41


def test_rows_are_counted_where_nobody_knows_how_many_there_are():
    endless = iter(range(10))
    assert steps(DataPosition(endless, arguments()), (3, 4), (1, 1), ends_epoch=True) == 26
    assert steps(DataPosition(None, arguments()), (3, 4)) == 24


def test_counting_goes_on_from_a_saved_position():
    position = DataPosition(range(41), arguments())
    position.samples_seen = 41 + 24
    assert steps(position, (3, 4), ends_epoch=True) == 82


def test_rows_that_several_ranks_read_count_once():
    position = DataPosition(range(1000), arguments(world_size=8), num_data_ranks=2)
    assert position.global_batch_size == 2 * 3 * 4
    assert steps(position, (3, 4)) == 2 * 3 * 4
