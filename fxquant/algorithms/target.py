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

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.observers.moments import InputMoments, LayerMoments, damped

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the mean second moment
OUTPUTS = 64  # on which they are tried


@dataclass(frozen=True, order=True)
class Shrinkage:
    """How much of what the moments say about the shift is believed.

    Attributes:
        gain: by how much the squared error on unseen halves falls, on some of the outputs.
        share: the factor of the regression.
        ridge: of the regression, in units of the mean second moment.
    """

    gain: float
    share: float
    ridge: float

    def applied(self, weight: Tensor, moments: LayerMoments, rows: slice) -> Tensor:
        """Some rows of the target, from the same rows of the float32 weight."""
        share = 2 * self.share / (1 + self.share)
        cross = moments.cross_of(rows).sum(0)
        return weight + share * _regression(moments.input, None, cross, self.ridge)


def best_shrinkage(moments: LayerMoments) -> Shrinkage | None:
    """What does best from one half of the tokens to the other; None where nothing gains."""
    if moments.tokens < moments.in_features or not moments.has_shift:
        return None
    cross = moments.cross_of(slice(None, None, max(1, moments.out_features // OUTPUTS)))
    tried = [_try(moments.input, cross, RIDGES[len(RIDGES) // 2])]
    for direction in (-1, 1):  # the gain rises to one peak
        place = len(RIDGES) // 2 + direction
        while 0 <= place < len(RIDGES):
            tried.append(_try(moments.input, cross, RIDGES[place]))
            if tried[-1] < max(tried):
                break
            place += direction
    best = max(tried)
    return best if best.gain > 0 else None


def _try(moments: InputMoments, cross: Tensor, ridge: float) -> Shrinkage:
    """How well a ridge does on some rows of the moments' cross [2, rows, in]."""
    along = size = 0.0
    for seen, unseen in ((0, 1), (1, 0)):
        step = _regression(moments, seen, cross[seen], ridge)
        along += float((step * cross[unseen]).sum())
        size += float(((step @ moments.hessians[unseen]) * step).sum())
    if not size > 0:
        return Shrinkage(0.0, 0.0, ridge)
    share = min(max(along / size, 0.0), 1.0)
    return Shrinkage(share * (2 * along - share * size), share, ridge)


def _regression(moments: InputMoments, half: int | None, cross: Tensor, ridge: float) -> Tensor:
    """The ridge regression `cross` · H⁻¹ on a half of the tokens, or on all of them."""

    def factored() -> tuple[Tensor, Tensor]:
        hessian = moments.hessian if half is None else moments.hessians[half]
        factor, failed = torch.linalg.cholesky_ex(damped(hessian, ridge))
        return factor, failed

    factor, failed = moments.once(("ridge", half, ridge), factored)
    if failed:
        return torch.zeros_like(cross)
    return torch.cholesky_solve(cross.T, factor).T
