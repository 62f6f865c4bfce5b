"""Compiles all kernels for a Hopper GPU where there is none: what the interpreter accepts, the compiler may not.

The launching code runs as it is, on tensors of the CPU, but what it has compiled is not started. Prints a line of JSON
for each kernel: its name, its bytes of shared memory, and how many instructions for tensor cores are in it.
"""

import json
import re
from types import SimpleNamespace

import kernels_alone  # noqa: F401
import torch
from experts_cases import Case, make_inputs, run
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moe_hf.kernels import experts_triton
from moe_hf.kernels.triton_tiles import Tile, Tiles

STAGES = 3
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

    def compile_and_tell(self, *args, grid, warmup, **kwargs):
        kernel = start(self, *args, grid=grid, warmup=True, **kwargs)
        tensor_cores = len(re.findall(r"wgmma\.mma_async", kernel.asm["ptx"]))
        print(json.dumps([self.fn.__name__, kernel.metadata.shared, tensor_cores]), flush=True)
        return kernel

    JITFunction.run = compile_and_tell


def main() -> None:
    compile_only()
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


if __name__ == "__main__":
    main()
