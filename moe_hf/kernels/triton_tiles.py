"""Sizes of the tiles that the Triton kernels compute, from a table.

Nothing is timed at run time: another choice sums in another order, and two runs of the same training would differ.

Not measured yet, to be tried on a Hopper GPU: most of these tiles take so much shared memory that one program runs on a
multiprocessor, and nothing hides its epilogue. Where sums are short, of at most 1024 terms, two programs of 96 KiB each
may be faster, with 4 warps and a depth of 64: of 128 rows and 3 stages, 128 columns for `down` and `input_gradient`, 64
for `gate_up`; of 64 rows and 4 stages, 128 columns for `down`, 64 for `gate_up`. None of these spills registers, but
128 rows and columns of `activation_gradient` do with 4 warps.
"""

from functools import lru_cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """How one product is cut: `columns` of the result in a program, `depth` summed in one step of its pipeline.

    In shared memory lie the operands of `num_stages` steps.
    """

    columns: int
    depth: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The cuts of all products of one mixture of experts."""

    rows: int  # of every product whose rows are tokens
    gate_up: Tile  # twice: gate and up in one program
    down: Tile
    activation_gradient: Tile
    input_gradient: Tile
    weight_rows: int  # of the gradients of weights, whose rows are outputs
    weight_gradient: Tile


# At 128 rows a step of 256 columns takes 48 KiB of shared memory: three stages fit into the 163 KiB of an A100, four
# into the 227 KiB of a Hopper GPU. The epilogue of the gradient of the activations needs registers: 128 columns.
_LARGE = Tiles(
    rows=128,
    gate_up=Tile(columns=128, depth=64, num_warps=8, num_stages=4),
    down=Tile(columns=256, depth=64, num_warps=8, num_stages=4),
    activation_gradient=Tile(columns=128, depth=64, num_warps=8, num_stages=4),
    input_gradient=Tile(columns=256, depth=64, num_warps=8, num_stages=4),
    weight_rows=128,
    weight_gradient=Tile(columns=256, depth=64, num_warps=8, num_stages=4),
)
# Few rows for each expert. The gradient of the inputs needs registers here: 256 columns would spill.
_FLAT = Tiles(
    rows=64,
    gate_up=Tile(columns=128, depth=64, num_warps=4, num_stages=4),
    down=Tile(columns=256, depth=64, num_warps=4, num_stages=4),
    activation_gradient=Tile(columns=128, depth=64, num_warps=4, num_stages=4),
    input_gradient=Tile(columns=128, depth=64, num_warps=4, num_stages=4),
    weight_rows=128,
    weight_gradient=Tile(columns=128, depth=64, num_warps=8, num_stages=3),
)
# Little shared memory, as on GPUs of workstations.
_SMALL = Tiles(
    rows=64,
    gate_up=Tile(columns=64, depth=32, num_warps=4, num_stages=4),
    down=Tile(columns=128, depth=32, num_warps=4, num_stages=4),
    activation_gradient=Tile(columns=64, depth=32, num_warps=4, num_stages=4),
    input_gradient=Tile(columns=128, depth=32, num_warps=4, num_stages=4),
    weight_rows=64,
    weight_gradient=Tile(columns=128, depth=32, num_warps=4, num_stages=4),
)
# Float32 in full precision: without tensor cores, operands live in registers.
_FULL = Tiles(
    rows=64,
    gate_up=Tile(columns=32, depth=32, num_warps=4, num_stages=2),
    down=Tile(columns=64, depth=32, num_warps=4, num_stages=2),
    activation_gradient=Tile(columns=64, depth=32, num_warps=4, num_stages=2),
    input_gradient=Tile(columns=64, depth=32, num_warps=4, num_stages=2),
    weight_rows=64,
    weight_gradient=Tile(columns=64, depth=32, num_warps=4, num_stages=2),
)

_RESERVED = 8192  # bytes of shared memory for what is no stage: indices, barriers
_FEW_ROWS = 64
_LEAST_MEMORY_OF_LARGE = 160_000


def tiles_for(dtype: torch.dtype, hidden: int, width: int, rows_per_expert: int, device: torch.device) -> Tiles:
    """Choose the tiles of experts from `hidden` to `width` and back, each with so many rows in the mean.

    The number of rows decides between two choices only, so that no kernel is compiled more than twice for a model.
    """
    return _tiles_for(dtype, hidden, width, rows_per_expert <= _FEW_ROWS, device)


@lru_cache
def _tiles_for(dtype: torch.dtype, hidden: int, width: int, few_rows: bool, device: torch.device) -> Tiles:
    memory = _shared_memory(device)
    if dtype.itemsize > 2:
        tiles = _FULL
    elif memory < _LEAST_MEMORY_OF_LARGE:
        tiles = _SMALL
    else:
        tiles = _FLAT if few_rows else _LARGE

    def fit(tile: Tile, rows: int, columns: int, depth: int, right_operands: int = 1) -> Tile:
        columns, depth = min(tile.columns, _side(columns)), min(tile.depth, _side(depth))
        stage = (rows + right_operands * columns) * depth * dtype.itemsize
        return Tile(columns, depth, tile.num_warps, max(1, min(tile.num_stages, (memory - _RESERVED) // stage)))

    rows = tiles.rows
    return tiles._replace(
        gate_up=fit(tiles.gate_up, rows, width, hidden, right_operands=2),
        down=fit(tiles.down, rows, hidden, width),
        activation_gradient=fit(tiles.activation_gradient, rows, width, hidden),
        input_gradient=fit(tiles.input_gradient, rows, hidden, width),
        weight_gradient=fit(tiles.weight_gradient, tiles.weight_rows, max(hidden, width), tiles.weight_gradient.depth),
    )


def _side(length: int) -> int:
    """Return the smallest power of two that holds a length, and at least what a tensor core multiplies."""
    return max(16, 1 << (length - 1).bit_length())


@lru_cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0  # Triton's interpreter
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
