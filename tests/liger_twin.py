"""Pure PyTorch in the place of Liger's kernels, with their signatures in version 0.8.5, for machines without a GPU."""

import sys
from inspect import signature
from types import ModuleType

import torch


class CrossEntropyKernel:
    """`liger_kernel.ops.cross_entropy.liger_cross_entropy_kernel`, called as `kernel[grid](…)`: a row for a program."""

    def __init__(self) -> None:
        self.num_launches = 0

    def __getitem__(self, grid: tuple[int]):
        def launch(*, num_warps: int, **arguments) -> None:
            assert num_warps in (16, 32)
            self.num_launches += 1
            self.run(grid[0], **arguments)

        return launch

    @staticmethod
    def run(
        num_rows: int,
        *,
        X_ptr: torch.Tensor,
        X_stride: int,
        Y_ptr: torch.Tensor,
        Y_stride: int,
        weight_ptr: torch.Tensor | None,
        loss_ptr: torch.Tensor,
        z_loss_ptr: torch.Tensor,
        loss_stride: int,
        token_accuracy_ptr: torch.Tensor | None,
        token_accuracy_stride: int,
        predicted_tokens_ptr: torch.Tensor | None,
        predicted_tokens_stride: int,
        n_cols: int,
        n_non_ignore: int,
        sum_non_ignore_weight: float,
        weight_sum: float,
        ignore_index: int,
        lse_square_scale: float,
        label_smoothing: float,
        reduction: str,
        softcap: float | None,
        RETURN_Z_LOSS: bool,
        RETURN_TOKEN_ACCURACY: bool,
        RETURN_PREDICTED_TOKENS: bool,
        BLOCK_SIZE: int,
        HAS_WEIGHT: bool,
        HAS_SOFTCAPPING: bool,
        HAS_GRADIENTS: bool,
    ) -> None:
        """Walk row by row over flat memory by the strides, as the kernel does."""
        assert reduction == "sum" and RETURN_Z_LOSS and BLOCK_SIZE & (BLOCK_SIZE - 1) == 0
        assert not (HAS_WEIGHT or HAS_SOFTCAPPING or RETURN_TOKEN_ACCURACY or RETURN_PREDICTED_TOKENS)
        for row in range(num_rows):
            logits = X_ptr.as_strided((n_cols,), (1,), X_ptr.storage_offset() + row * X_stride)
            label = Y_ptr.as_strided((1,), (1,), Y_ptr.storage_offset() + row * Y_stride).item()
            if label == ignore_index:
                logits.zero_()  # even where no gradient is asked for
                continue
            values = logits.float()
            lse = values.logsumexp(0)
            loss = (1 - label_smoothing) * (lse - values[label]) + label_smoothing * (lse - values.mean())
            z_loss = lse_square_scale * lse**2
            loss_ptr[row * loss_stride], z_loss_ptr[row * loss_stride] = loss + z_loss, z_loss
            if HAS_GRADIENTS:
                gradient = (1 + 2 * lse_square_scale * lse) * values.softmax(0) - label_smoothing / n_cols
                gradient[label] -= 1 - label_smoothing
                logits.copy_(gradient)


CrossEntropyKernel.arg_names = [*signature(CrossEntropyKernel.run).parameters][1:]


def install(monkeypatch, **modules: dict) -> None:
    """Let `import liger_kernel.…` find modules with these names in them: `ops__rope={"LigerRopeFunction": …}`."""
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    for path, names in modules.items():
        parts = path.split("__")
        for end in range(1, len(parts) + 1):
            name = ".".join(["liger_kernel", *parts[:end]])
            if name not in sys.modules or end == len(parts):
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(names)
