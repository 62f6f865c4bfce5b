"""Compile the dense parts of a model, and leave alone whatever depends on the data or is looked into.

Compiled are the norms of the layers, the dense MLPs (those of shared experts too) and what attention does before its
kernel. Routers and experts stay as they are: no compiler knows how many tokens an expert will get, and AutoEP sends
them to other ranks. Functions are exchanged, not modules, so that no name of a weight changes, and that the hooks of
ZeRO, of output recording and of telemetry run outside of what is compiled.
"""

import os
import shutil
from types import MethodType

import torch
from torch import nn

from ..errors import ConfigError
from ..modeling_moe import MoEAttention, MoEMLP, MoERMSNorm

# The method that is compiled. Of attention not all: its kernels are compiled already, and masks and caches would each
# ask for another version.
_REGIONS: dict[type[nn.Module], str] = {
    MoERMSNorm: "forward",
    MoEMLP: "forward",
    MoEAttention: "_project_normalized",
}
# What ZeRO-3 is to fetch as one unit: its hooks on the parts would lie inside of what is compiled.
FETCHED_WHOLE = (MoEAttention, MoEMLP)

# Their CUDA graphs write the results of one layer over those of another that the backward pass still needs.
_MODES_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def compile_dense_parts(model: nn.Module, backend: str = "inductor", mode: str | None = None) -> int:
    """Let the dense parts of `model` run compiled, from their first call on.

    All layers share one compilation, which takes their weights as arguments and the sizes of batches as unknown:
    neither another layer nor another length starts the compiler again. Training and evaluation each have a version.

    Args:
        model: with `moe_hf` layers.
        backend: of `torch.compile`.
        mode: of `torch.compile`, for the backend `"inductor"`.

    Returns:
        How many functions were exchanged.
    """
    settings = {"backend": backend, "dynamic": True} | ({} if mode is None else {"mode": mode})
    compiled = {kind: torch.compile(getattr(kind, name), **settings) for kind, name in _REGIONS.items()}
    modules = [module for module in model.modules() if type(module) in _REGIONS]
    for module in modules:
        kind = type(module)
        setattr(module, _REGIONS[kind], MethodType(compiled[kind], module))
    return len(modules)


def check_compilation(backend: str | None, mode: str | None) -> None:
    """Find before a run what `torch.compile` would find in its first step.

    Args:
        backend: of `torch.compile`; `None` for `"inductor"`.
        mode: of `torch.compile`.

    Raises:
        ConfigError: an unknown backend or mode, a mode that does not fit, or no compiler for what inductor writes.
    """
    backend = backend or "inductor"
    if backend == "cudagraphs" or mode in _MODES_WITH_CUDA_GRAPHS:
        flag = "--torch_compile_backend cudagraphs" if backend == "cudagraphs" else f"--torch_compile_mode {mode}"
        raise ConfigError(f"{flag} records CUDA graphs, which layers that share compiled code cannot; leave it out.")
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ConfigError(f"--torch_compile_backend {backend} is unknown to torch; use inductor, aot_eager or eager.")
    if backend == "inductor":
        _check_inductor(mode)
    elif mode is not None:
        raise ConfigError(f"--torch_compile_mode {mode} is one of inductor's, not of {backend}'s; leave it out.")


def _check_inductor(mode: str | None) -> None:
    from torch._inductor import cpp_builder, exc, list_mode_options

    if mode is not None and mode not in list_mode_options():
        raise ConfigError(
            f"--torch_compile_mode {mode} is unknown to torch; use default or max-autotune-no-cudagraphs."
        )
    try:
        if not torch.cuda.is_available():
            cpp_builder.get_cpp_compiler()
        elif not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            raise exc.InvalidCxxCompiler
    except exc.InvalidCxxCompiler:
        raise ConfigError(
            "--torch_compile needs a C++ compiler and finds none; install g++ (apt-get install g++) or leave it out."
        ) from None
