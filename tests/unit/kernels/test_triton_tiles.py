"""The table of tiles: whatever the GPU and the model, the stages of every pipeline fit into shared memory."""

import pytest
import torch

from moe_hf.kernels import triton_tiles
from moe_hf.kernels.triton_tiles import tiles_for

# Shared memory that a program may have on GPUs with compute capability 9.0, 8.0 and 8.9.
HOPPER, AMPERE, ADA = 232_448, 166_912, 101_376
CPU = torch.device("cpu")


@pytest.fixture
def on_gpu(monkeypatch):
    def put(memory: int) -> None:
        monkeypatch.setattr(triton_tiles, "_shared_memory", lambda device: memory)
        triton_tiles._tiles_for.cache_clear()

    yield put
    triton_tiles._tiles_for.cache_clear()


@pytest.mark.parametrize("memory", [HOPPER, AMPERE, ADA])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows_per_expert", [16, 1024])
@pytest.mark.parametrize(("hidden", "width"), [(2048, 1024), (48, 4096), (7168, 20)])
def test_stages_fit_into_shared_memory(memory, dtype, rows_per_expert, hidden, width, on_gpu):
    on_gpu(memory)
    tiles = tiles_for(dtype, hidden, width, rows_per_expert, CPU)
    products = {
        "gate_up": (tiles.rows, 2 * tiles.gate_up.columns, width, hidden),
        "down": (tiles.rows, tiles.down.columns, hidden, width),
        "activation_gradient": (tiles.rows, tiles.activation_gradient.columns, width, hidden),
        "input_gradient": (tiles.rows, tiles.input_gradient.columns, hidden, width),
        "weight_gradient": (tiles.weight_rows, tiles.weight_gradient.columns, max(hidden, width), 4096),
    }
    for name, (rows, columns, length, depth) in products.items():
        tile = getattr(tiles, name)
        assert tile.num_stages >= 2 and tile.num_stages * (rows + columns) * tile.depth * dtype.itemsize < memory
        # No wider than the result, but for the least that a tensor core takes.
        assert 16 <= tile.columns < max(2 * length, 17) and 16 <= tile.depth < max(2 * depth, 17)


def test_stages_use_what_memory_there_is(on_gpu):
    on_gpu(HOPPER)
    assert tiles_for(torch.bfloat16, 2048, 1024, 1024, CPU).gate_up.num_stages == 4
    on_gpu(AMPERE)
    assert tiles_for(torch.bfloat16, 2048, 1024, 1024, CPU).gate_up.num_stages == 3


def test_number_of_rows_chooses_between_two_tables(on_gpu):
    on_gpu(HOPPER)
    for rows in range(0, 5000, 8):
        assert tiles_for(torch.bfloat16, 2048, 1024, rows, CPU).rows == (64 if rows <= 64 else 128)
    assert triton_tiles._tiles_for.cache_info().currsize == 2
