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


class LigerRMSNormFunction(torch.autograd.Function):
    """`liger_kernel.ops.rms_norm.LigerRMSNormFunction` with Llama's casting."""

    @staticmethod
    def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert casting_mode == "llama" and offset == 0.0
        inverse = torch.rsqrt(X.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(X, W, inverse)
        ctx.in_place = in_place
        return (X.float() * inverse).to(X.dtype) * W

    @staticmethod
    def backward(ctx, dY):
        X, W, inverse = ctx.saved_tensors
        normalized, weighted = X.float() * inverse, (dY * W).float()
        dW = (dY.float() * normalized.to(X.dtype)).flatten(0, -2).sum(0).to(W.dtype)
        dX = inverse * (weighted - normalized * (weighted * normalized).mean(-1, keepdim=True))
        dX = dY.copy_(dX) if ctx.in_place else dX.to(dY.dtype)
        return dX, dW, None, None, None, None, None


class LigerSiLUMulFunction(torch.autograd.Function):
    """`liger_kernel.ops.swiglu.LigerSiLUMulFunction`, whose gradients take the memory of its inputs."""

    @staticmethod
    def forward(ctx, a, b, gate_multiplier=1.0, down_multiplier=1.0):
        assert gate_multiplier == down_multiplier == 1.0
        ctx.save_for_backward(a, b)
        return torch.nn.functional.silu(a.float()).to(b.dtype) * b

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        sigmoid = a.float().sigmoid()
        silu = a.float() * sigmoid
        of_b = dc * silu
        a.copy_(dc * (silu * (1 - sigmoid) + sigmoid) * b)
        b.copy_(of_b)
        return a, b, None, None


class LigerRopeFunction(torch.autograd.Function):
    """`liger_kernel.ops.rope.LigerRopeFunction`, which rotates where queries and keys are, as its gradients do."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        ctx.save_for_backward(cos, sin)
        return _rotate_in_place(q, cos, sin), _rotate_in_place(k, cos, sin)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return _rotate_in_place(dq, cos, -sin), _rotate_in_place(dk, cos, -sin), None, None, None, None, None


def _rotate_in_place(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rows = x.transpose(1, 2).contiguous()
    half = cos.shape[-1] // 2
    first, second = rows[..., :half], rows[..., half : 2 * half]
    cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
    turned = first * cos - second * sin, second * cos + first * sin
    first.copy_(turned[0]), second.copy_(turned[1])
    return rows.transpose(1, 2)


ELEMENTWISE = {
    "ops__rms_norm": {"LigerRMSNormFunction": LigerRMSNormFunction},
    "ops__swiglu": {"LigerSiLUMulFunction": LigerSiLUMulFunction},
    "ops__rope": {"LigerRopeFunction": LigerRopeFunction},
}
