"""Our model with what a user may choose beside the default: Liger's kernels, a compiler, SonicMoE."""

import torch

from moe_hf import MoEForCausalLM
from moe_hf.training.compiling import check_compilation, compile_dense_parts
from moe_hf.training.experts_kernel import SONICMOE, choose_experts
from moe_hf.training.liger import LigerKernels, use_liger_kernels

from ..cases import StepCase
from .base import needs_cuda_package, refusal
from .models import OurModel, our_config


class OurLigerModel(OurModel):
    """Ours as `--use_liger_kernel` trains it: Liger's norms, rotations and activations."""

    def unavailable(self, case: StepCase, device: str) -> str | None:
        return needs_cuda_package("liger_kernel", device)

    def build(self, case: StepCase) -> MoEForCausalLM:
        model = super().build(case)
        use_liger_kernels(model, LigerKernels())
        return model


class OurCompiledModel(OurModel):
    """Ours as `--torch_compile` trains it: norms, dense MLPs and the projections of attention are compiled."""

    def unavailable(self, case: StepCase, device: str) -> str | None:
        return refusal(lambda: check_compilation(backend=None, mode=None))

    def build(self, case: StepCase) -> MoEForCausalLM:
        model = super().build(case)
        compile_dense_parts(model)
        return model


class OurSonicMoEModel(OurModel):
    """Ours as `--experts_implementation sonicmoe` trains it, the default with `--bf16` on a Hopper GPU that has it."""

    def unavailable(self, case: StepCase, device: str) -> str | None:
        if device != "cuda":
            return "it has kernels for CUDA only"
        return refusal(lambda: choose_experts(SONICMOE, in_bfloat16=case.dtype == "bf16", in_autoep=False))

    def build(self, case: StepCase) -> MoEForCausalLM:
        return MoEForCausalLM._from_config(our_config(case), dtype=torch.float32, experts_implementation=SONICMOE)
