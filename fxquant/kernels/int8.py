"""The INT8 matrix product with one scale a row, on torch's own op where that applies."""

import torch
import torch.nn.functional as F
from torch import Tensor

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
        [..., out] in the dtype of `x`. On a CPU the activations go through bfloat16.
    """
    if q.shape[1] != x.shape[-1]:
        x = F.pad(x, (0, q.shape[1] - x.shape[-1]))
    if x.device.type != "cpu":
        return F.linear(x, (q * scales[:, None]).to(x.dtype))
    rows = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
    y = torch.ops.aten._weight_int8pack_mm(rows, q, scales)
    return y.reshape(*x.shape[:-1], q.shape[0]).to(x.dtype)
