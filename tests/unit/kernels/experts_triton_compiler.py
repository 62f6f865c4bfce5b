"""Compiles all kernels for a Hopper GPU where there is none: what the interpreter accepts, the compiler may not.

The launching code runs as it is, on tensors of the CPU, but what it has compiled is not started. Prints a line of JSON
for each kernel: its name, its bytes of shared memory, how many instructions for tensor cores are in it, and how many
bytes of registers it spills. Given the sizes `T H E K I` it compiles with the tiles of the table for these, otherwise
with small ones.
"""

import io
import json
import re
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import kernels_alone  # noqa: F401
import torch
from experts_cases import ALL, Case, Inputs, layout, make_inputs, run
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moe_hf.kernels import experts_triton, triton_tiles
from moe_hf.kernels.triton_tiles import Tile, Tiles

STAGES = 3
SHARED_MEMORY = 232_448  # of a Hopper GPU
TARGET = GPUTarget("cuda", 90, 32)
TILES = Tiles(
    rows=64,
    gate_up=Tile(32, 32, 4, STAGES),
    down=Tile(64, 32, 4, STAGES),
    activation_gradient=Tile(64, 32, 4, STAGES),
    input_gradient=Tile(64, 32, 4, STAGES),
    weight_rows=64,
    weight_gradient=Tile(64, 32, 4, STAGES),
)


def compile_only() -> None:
    """Let kernels be compiled where they would be started."""
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: TARGET
        )
    )
    start = JITFunction.run
    knobs.nvidia.dump_ptxas_log = True

    def compile_and_tell(self, *args, grid, warmup, **kwargs):
        with redirect_stdout(io.StringIO()) as log:
            kernel = start(self, *args, grid=grid, warmup=True, **kwargs)
        # Compiled once, launched more often: then there is no log.
        if spilled := re.search(r"(\d+) bytes spill stores", log.getvalue()):
            tensor_cores = len(re.findall(r"wgmma\.mma_async", kernel.asm["ptx"]))
            line = [self.fn.__name__, kernel.metadata.shared, tensor_cores, int(spilled[1])]
            print(json.dumps(line), flush=True)
        return kernel

    JITFunction.run = compile_and_tell


def compile_small_tiles() -> None:
    experts_triton.tiles_for = lambda *_: TILES
    case = Case(T=8, H=128, E=4, K=2, I=64, dtype=torch.bfloat16)
    run(experts_triton, case, make_inputs(case))
    # Straight to the tokens, without the other gradients.
    case = Case(T=8, H=128, E=4, K=1, I=64, dtype=torch.bfloat16, packed=False)
    inputs = make_inputs(case)
    run(experts_triton, case, inputs, needs=(True, False, False, False))
    # Rows of other ranks, which weigh nothing of their own.
    run(experts_triton, case, inputs._replace(top_k_weights=None), needs=(True, False, True, True))
    order = experts_triton.sort_by_expert(inputs.top_k_index, case.E)
    experts_triton.dot_rows(inputs.hidden_states, inputs.hidden_states, order)
    experts_triton.gather_rows(inputs.hidden_states, inputs.top_k_weights, order)


def compile_tiles_of_the_table(case: Case) -> None:
    """Nothing is drawn or copied: the weights would take gigabytes."""
    triton_tiles._shared_memory = lambda device: SHARED_MEMORY
    hidden_states, _, weights, gate_up, down, gradient = inputs = empty_inputs(case)
    order = experts_triton.sort_by_expert(inputs.top_k_index, case.E)
    gate_up = layout(case, gate_up)
    _, product = experts_triton.forward(hidden_states, weights, order, gate_up, down)
    experts_triton.backward(gradient, hidden_states, weights, product, order, gate_up, down, ALL)
    experts_triton.gather_rows(gradient, weights, order)


def empty_inputs(case: Case) -> Inputs:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=case.dtype)

    index = torch.zeros(case.T, case.K, dtype=torch.int64)
    gate_up, down = empty(case.E, 2 * case.I, case.H), empty(case.E, case.H, case.I)
    return Inputs(empty(case.T, case.H), index, torch.empty(case.T, case.K), gate_up, down, empty(case.T, case.H))


def main() -> None:
    compile_only()
    if sizes := [int(size) for size in sys.argv[1:]]:
        compile_tiles_of_the_table(Case(*sizes, dtype=torch.bfloat16))
    else:
        compile_small_tiles()


if __name__ == "__main__":
    main()
