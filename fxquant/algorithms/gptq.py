"""GPTQ: round column by column and let later columns make up for the error.

Frantar et al., arXiv:2210.17323, with the columns of largest input first and the scales of all
groups fixed beforehand, so that groups keep their place.
"""

import torch
from torch import Tensor

from fxquant.algorithms.lazy_update import lazy_update
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.numerics.grouping import expand_groups
from fxquant.numerics.integers import dequantize_affine, quantize_affine
from fxquant.numerics.quantized_weight import QuantizedWeight
from fxquant.observers.moments import LayerMoments, damped

DAMPING = 0.05  # of the mean second moment, at first: calibration data are few
MOST_DAMPING = 10.0


def gptq(
    weight: Tensor,
    moments: LayerMoments,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    integer_zero_points: bool = False,
    code_book: str | None = None,
    damping: float = DAMPING,
) -> QuantizedWeight:
    """Quantize a weight for the inputs it will see.

    Args:
        weight: floating point [out, in].
        moments: of the layer.
        bits: of an integer.
        group_size: columns a group; the last group may be short. -1: one group a row.
        symmetric: one fixed zero point, or one for each group.
        integer_zero_points: these are whole numbers, 0 .. 2 ** bits - 1, not fractions.
        code_book: a name of `numerics.code_books.CODE_BOOKS`, or None for integers.
        damping: what is added to the diagonal of the second moments, in units of its mean; more is
            taken where they have no inverse.

    Returns:
        The integers with their scales and zero points. Inputs that are always zero keep the
        nearest integers; without any token the weight is rounded to nearest.

    Raises:
        WeightError: the weight is not a finite matrix.
        OptionError: `group_size` or `bits` is not usable, or not with the code book.
    """
    fixed = round_to_nearest(
        weight, bits=bits, group_size=group_size, symmetric=symmetric,
        integer_zero_points=integer_zero_points, code_book=code_book,
        importance=moments.importance,
    )  # fmt: skip
    if not moments.tokens:
        return fixed
    columns, group_size, integer = weight.shape[1], fixed.group_size, fixed.integer
    order, factor = moments.input.once(
        ("gptq", damping), lambda: _ordered_factor(moments.hessian, damping)
    )
    scales = expand_groups(fixed.scales, group_size, columns)[:, order].T.contiguous()
    zeros = expand_groups(fixed.zero_points, group_size, columns)[:, order].T.contiguous()
    rest = weight.detach().float()[:, order].T.contiguous()  # [in, out]
    q = torch.empty_like(rest)
    diagonal = factor.diagonal().tolist()

    def step(i: int, column: Tensor) -> Tensor:
        q[i] = quantize_affine(column, scales[i], zeros[i], integer)
        return (dequantize_affine(q[i], scales[i], zeros[i]) - column).div_(diagonal[i])

    lazy_update(rest, factor, step)
    integers = torch.empty_like(q)
    integers[order] = q
    return fixed.with_integers(integers.T, fixed.scales, fixed.zero_points)


def _ordered_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The columns of `hessian` by size, and its inverse factor in that order."""
    order = hessian.diagonal().argsort(descending=True)
    return order, _inverse_factor(hessian[order][:, order], damping)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U of the damped inverse of `hessian` H [in, in], UᵀU = H⁻¹.

    Of H with both axes reversed, L Lᵀ, it is the inverse of L, reversed again: H⁻¹ is never formed.
    """
    while damping <= MOST_DAMPING:
        # float32 first; float64 where it is too coarse; then more damping
        for dtype in (torch.float32, torch.float64):
            reverse = damped(hessian, damping).to(dtype).flip(0, 1)
            lower, failed = torch.linalg.cholesky_ex(reverse)
            if not failed:
                identity = torch.eye(len(hessian), dtype=dtype)
                upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
                if torch.isfinite(upper).all():
                    return upper.float()
        damping *= 10
    return torch.eye(len(hessian))  # no structure is left: plain rounding


def corrected_bias(
    weight: Tensor, quantized: Tensor, bias: Tensor | None, moments: LayerMoments
) -> Tensor | None:
    """The bias [out] with which the quantized layer's mean output is the float model's.

    Args:
        weight: the float weight [out, in].
        quantized: the dequantized weight [out, in].
        bias: [out] or None.
        moments: of the layer.

    Returns:
        A bias of the dtype of `weight`; None where no token was seen and there was none.
    """
    if not moments.tokens:
        return bias
    lost = (weight.detach().double() - quantized.double()) @ (moments.total / moments.tokens)
    shift = lost + moments.total_shift / moments.tokens
    base = torch.zeros_like(shift) if bias is None else bias.detach().double()
    return (base + shift).to(weight.dtype)


def quantization_loss(weight: Tensor, quantized: Tensor, moments: LayerMoments) -> float:
    """The mean squared error of the layer's output on its quantized input, over tokens."""
    difference = (quantized - weight.detach().float()).double()
    total = ((difference @ moments.hessian.double()) * difference).sum()
    return float(total / max(moments.tokens, 1))
