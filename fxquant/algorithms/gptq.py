"""GPTQ: round column by column and let later columns make up for the error.

Frantar et al., arXiv:2210.17323, with the columns of largest input first and the scales of all
groups fixed beforehand (so that groups keep their place), and with the target of Li et al.,
"GPTAQ", arXiv:2504.02692: not the layer's output on its quantized input, but on the float one.
"""

import torch
from torch import Tensor

from fxquant.algorithms.moments import InputMoments
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.numerics.grouping import expand_groups
from fxquant.numerics.integers import UINT4, dequantize_affine, quantize_affine
from fxquant.numerics.weights import Int4Weight

BLOCK = 128  # columns whose updates are applied to the rest together
DAMPING = 0.01  # of the mean second moment, at first
MOST_DAMPING = 10.0
DRIFT_SHARE = 0.25  # of the float target: all of it overfits the calibration data


def gptq(
    weight: Tensor,
    moments: InputMoments,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    drift_share: float = DRIFT_SHARE,
) -> Int4Weight:
    """Quantize a weight to INT4 for the inputs it will see.

    Args:
        weight: floating point [out, in].
        moments: of the layer's input.
        group_size: columns a group; the last group may be short.
        symmetric: one fixed zero point (8), or one for each group.
        drift_share: how much of the float model's input to aim at, 0 (plain GPTQ) to 1.

    Returns:
        The integers with their scales and zero points. Inputs that are always zero keep the
        nearest integers; without any token the weight is rounded to nearest.

    Raises:
        WeightError: the weight is not a finite matrix.
    """
    fixed = round_to_nearest(
        weight, group_size=group_size, symmetric=symmetric, importance=moments.importance
    )
    if not moments.tokens:
        return fixed
    columns = weight.shape[1]
    order = moments.second.diagonal().argsort(descending=True)
    factor = _inverse_factor(moments.second[order][:, order])
    drift = moments.drift[order][:, order]
    # arXiv:2504.02692, equation 14
    pull = drift_share * (drift @ factor.T).triu(1) @ factor
    scales = expand_groups(fixed.scales, group_size, columns)[:, order]
    zeros = expand_groups(fixed.zero_points, group_size, columns)[:, order]
    rest = weight.detach().float()[:, order].clone()
    q = torch.empty_like(rest)
    for start in range(0, columns, BLOCK):
        part = slice(start, min(start + BLOCK, columns))
        block, errors, before = _round_block(
            rest[:, part], scales[:, part], zeros[:, part], factor[part, part], pull[part, part]
        )
        q[:, part] = block
        rest[:, part.stop :] -= errors @ factor[part, part.stop :]
        rest[:, part.stop :] += before @ pull[part, part.stop :]
    integers = torch.empty_like(q)
    integers[:, order] = q
    return Int4Weight.from_integers(
        integers.to(torch.uint8), fixed.scales, fixed.zero_points, group_size, symmetric
    )


def _round_block(
    rest: Tensor, scales: Tensor, zeros: Tensor, factor: Tensor, pull: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scaled errors and unrounded values of a block of columns, each [out, block]."""
    rest = rest.clone()
    q, errors, before = (torch.empty_like(rest) for _ in range(3))
    for i in range(rest.shape[1]):
        column = rest[:, i].clone()
        grid = scales[:, i], zeros[:, i]
        q[:, i] = quantize_affine(column, *grid, UINT4)
        error = (column - dequantize_affine(q[:, i], *grid)) / factor[i, i]
        rest[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
        rest[:, i + 1 :] += column[:, None] * pull[i, i + 1 :]
        errors[:, i], before[:, i] = error, column
    return q, errors, before


def _inverse_factor(second: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse of `second` [in, in]."""
    second = second.clone()
    diagonal = second.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    diagonal[diagonal == 0] = mean  # dead inputs are on their own: no error spreads from them
    damping = DAMPING
    while True:
        damped = second + damping * mean * torch.eye(len(second))
        # float32 first; float64 where it is too coarse; then more damping
        for dtype in (torch.float32, torch.float64):
            factor, failed = torch.linalg.cholesky_ex(damped.to(dtype))
            if not failed:
                inverse = torch.cholesky_inverse(factor)
                upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
                if not failed and torch.isfinite(upper).all():
                    return upper.float()
        damping *= 10
        if damping > MOST_DAMPING:
            return torch.eye(len(second)) / mean.sqrt()  # no structure is left: plain rounding


def corrected_bias(
    weight: Tensor, quantized: Tensor, bias: Tensor | None, moments: InputMoments
) -> Tensor | None:
    """The bias [out] with which the quantized layer's mean output is the float one's.

    Args:
        weight: the float weight [out, in].
        quantized: the dequantized weight [out, in].
        bias: [out] or None.
        moments: of the layer's input.

    Returns:
        A bias of the dtype of `weight`; None where no token was seen and there was none.
    """
    if not moments.tokens:
        return bias
    mean, mean_float = moments.total / moments.tokens, moments.total_float / moments.tokens
    shift = weight.detach().double() @ mean_float - quantized.double() @ mean
    base = torch.zeros_like(shift) if bias is None else bias.detach().double()
    return (base + shift).to(weight.dtype)


def quantization_loss(weight: Tensor, quantized: Tensor, moments: InputMoments) -> float:
    """The mean squared error of the layer's output on its quantized input, over tokens."""
    difference = (quantized - weight.detach().float()).double()
    total = ((difference @ moments.second.double()) * difference).sum()
    return float(total / max(moments.tokens, 1))
