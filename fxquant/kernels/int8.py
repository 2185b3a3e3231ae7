"""The INT8 matrix product with one scale a row, on torch's own op where that applies."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels.gradient import gradients_of_linear, needs_gradient

COLUMNS = 16  # torch 2.13's op reads beyond its input where columns are no multiple of this


def pad_int8(q: Tensor) -> Tensor:
    """The layout of the op: `q` int8 [out, in] with columns filled up; `q` itself where it fits."""
    missing = -q.shape[1] % COLUMNS
    return F.pad(q, (0, missing)) if missing else q


def matmul_int8(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """Compute x · (scale · q)ᵀ.

    Args:
        x: [..., in] float32, bfloat16 or float16.
        q: int8 [out, padded in], from `pad_int8`.
        scales: bfloat16 [out].

    Returns:
        [..., out] in the dtype of `x`. On a CPU the activations go through bfloat16. A gradient
        flows to `x`, and does not change the bits.
    """
    if x.device.type != "cpu":
        return F.linear(_padded(x, q), (q * scales[:, None]).to(x.dtype))
    if needs_gradient(x, None):
        return _Multiply.apply(x, q, scales)  # type: ignore[no-untyped-call]
    return _product(x, q, scales)


def _padded(x: Tensor, q: Tensor) -> Tensor:
    missing = q.shape[1] - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def _product(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    rows = _padded(x, q).reshape(-1, q.shape[1]).bfloat16().contiguous()
    y = torch.ops.aten._weight_int8pack_mm(rows, q, scales)
    return y.reshape(*x.shape[:-1], q.shape[0]).to(x.dtype)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(q, scales)
        ctx.in_features = x.shape[-1]
        return _product(x, q, scales)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, scales = ctx.saved_tensors
        weight = (q.float() * scales.float()[:, None])[:, : ctx.in_features]
        return gradients_of_linear(gradients[0], weight, None)[0], None, None
