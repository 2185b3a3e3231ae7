"""The weight to aim at: one that makes up for the error that has arrived at the layer.

With x the quantized model's input of the layer and the shift what its output lacks (see
`LayerMoments`), ‖(W x + shift) − Q x‖² is smallest over real Q at W + C H⁻¹, with C = Σ shift xᵀ
and H = Σ x xᵀ: rounding that weight for H is what remains to do. Aiming at the float model's
activations is the idea of Li et al., "GPTAQ", arXiv:2504.02692. C is an estimate from few tokens,
so it is shrunk, by a ridge and a factor: those that do best from one half of the tokens to the
other. What all tokens say has half the noise of what one half says, so the factor a, which is
signal / (signal + noise), becomes 2a / (1 + a).

A layer that has seen fewer tokens than it has inputs keeps its weight: C is then mostly noise, and
its regression costs more than all of GPTQ. Ridge and factor are chosen on some of the outputs,
which is enough for two numbers, so that trying them costs no more than factoring H.
"""

import torch
from torch import Tensor

from fxquant.observers.moments import LayerMoments, damped

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the mean second moment
OUTPUTS = 256  # on which they are tried


def float_target(weight: Tensor, moments: LayerMoments) -> Tensor:
    """The float weight that best gives the float model's output on the quantized model's input.

    Args:
        weight: floating point [out, in].
        moments: of the layer.

    Returns:
        float32 [out, in]; `weight` itself where nothing has to be made up for, where there are
        fewer tokens than inputs, or where what one half of the tokens says does not hold on the
        other.
    """
    weight = weight.detach().float()
    if moments.tokens < weight.shape[1] or not moments.crosses.any():
        return weight
    step = max(1, weight.shape[0] // OUTPUTS)
    tried = [_try(moments, moments.crosses[:, ::step], RIDGES[len(RIDGES) // 2])]
    for direction in (-1, 1):  # the gain rises to one peak
        place = len(RIDGES) // 2 + direction
        while 0 <= place < len(RIDGES):
            tried.append(_try(moments, moments.crosses[:, ::step], RIDGES[place]))
            if tried[-1] < max(tried):
                break
            place += direction
    gain, share, ridge = max(tried)
    if not gain > 0:
        return weight
    share = 2 * share / (1 + share)
    return weight + share * _regression(moments.hessian, moments.crosses.sum(0), ridge)


def _try(moments: LayerMoments, crosses: Tensor, ridge: float) -> tuple[float, float, float]:
    """By how much the squared error on unseen halves falls, the best factor, and `ridge`.

    `crosses` holds some rows of the moments', by half.
    """
    along = size = 0.0
    for seen, unseen in ((0, 1), (1, 0)):
        step = _regression(moments.hessians[seen], crosses[seen], ridge)
        along += float((step * crosses[unseen]).sum())
        size += float(((step @ moments.hessians[unseen]) * step).sum())
    if not size > 0:
        return 0.0, 0.0, ridge
    share = min(max(along / size, 0.0), 1.0)
    return share * (2 * along - share * size), share, ridge


def _regression(hessian: Tensor, cross: Tensor, ridge: float) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(damped(hessian, ridge))
    if failed:
        return torch.zeros_like(cross)
    return torch.cholesky_solve(cross.T, factor).T
