"""Norms, of a sum where wanted, as one op in C++ (csrc/norm_rows.h), and as torch's ops elsewhere.

`layer`: (x − mean) / √(variance + eps) · weight + bias. `rms`: x / √(mean of x² + eps), computed in
float32 and rounded to `dtype` before it is multiplied with the weight, as language models do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.kernels.eager import is_plain
from fxquant.kernels.extension import FLOAT_TYPES, NOT_BUILT, _native

NORM_KINDS = ("layer", "rms")


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str = "layer",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The norm of x + residual over the last dimension.

    Args:
        x: [..., columns].
        residual: what is added to it, or None.
        weight: [columns].
        bias: [columns], or None; `rms` has none.
        eps: is added to the mean of squares.
        kind: `"layer"` or `"rms"`.
        dtype: of an `rms` before its weight; None: that of the sum.

    Returns:
        [..., columns].
    """
    if _is_served(x, residual, weight, bias, dtype):
        return _natively(x, residual, weight, bias, eps, kind, None)
    return _in_torch(x if residual is None else x + residual, weight, bias, eps, kind, dtype)


def add_and_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str = "layer",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum x + residual, and its norm: see `norm`."""
    if _is_served(x, residual, weight, bias, dtype):
        total = torch.empty_like(x)
        return total, _natively(x, residual, weight, bias, eps, kind, total)
    total = x + residual
    return total, _in_torch(total, weight, bias, eps, kind, dtype)


def _is_served(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None,
) -> bool:
    """Whether the kernel computes it: tensors of one dtype that lie in one piece, no gradient."""
    rows = (x,) if residual is None else (x, residual)
    parameters = (weight,) if bias is None else (weight, bias)
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (*rows, *parameters))
    return (
        FAULT is None
        and not needs_gradient
        and x.dtype in FLOAT_TYPES
        and dtype in (None, x.dtype)
        and x.numel() > 0
        and all(
            is_plain(t) and t.shape == x.shape and t.dtype == x.dtype and t.is_contiguous()
            for t in rows
        )
        and all(
            t.shape == x.shape[-1:] and t.dtype == x.dtype and t.is_cpu and t.is_contiguous()
            for t in parameters
        )
    )


def _natively(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    total: Tensor | None,
) -> Tensor:
    float_type, columns, y = FLOAT_TYPES[x.dtype], x.shape[-1], torch.empty_like(x)
    _native.norm(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        float_type,
        x.numel() // columns,
        columns,
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if total is None else total.data_ptr(),
        y.data_ptr(),
        kind == "rms",
        eps,
        torch.get_num_threads(),
    )
    return y


def _in_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str, dtype: torch.dtype | None
) -> Tensor:
    if kind == "layer":
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    values = x.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return weight * values.to(dtype or x.dtype)


def self_test() -> str | None:
    """Norm a small known sum: why the extension cannot be trusted here, or None."""
    if NOT_BUILT is not None:
        return NOT_BUILT
    x = torch.arange(3 * 21, dtype=torch.float32, device="cpu").sin().view(3, 21)
    for kind, bias in (("layer", x[1]), ("rms", None)):
        found = _natively(x, x.cos(), x[0], bias, 1e-5, kind, None)
        expected = _in_torch(x + x.cos(), x[0], bias, 1e-5, kind, None)
        if not torch.allclose(found, expected, rtol=0, atol=1e-5):
            return f"it computes wrong results on this CPU ({_native.instruction_sets()[0]})"
    return None


FAULT = self_test()  # once: later calls may run under a fake or meta device
