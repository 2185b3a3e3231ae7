"""Refine a quantized layer by two steps that alternate.

1. Integers, with the scales fixed: coordinate descent moves one column's integers at a time to
   where the layer's squared error is smallest with all other columns as they are (Behdin et al.,
   "QuantEase", arXiv:2309.01885).
2. Scales and zero points, with the integers fixed: those of all groups of a row are the solution of
   one small least-squares problem.
"""

import torch
from torch import Tensor

from fxquant.algorithms.gptq import DAMPING
from fxquant.algorithms.lazy_update import lazy_update
from fxquant.numerics.grouping import expand_groups, group_count, to_groups
from fxquant.numerics.quantized_weight import (
    SCALE_DTYPE,
    QuantizedWeight,
)
from fxquant.numerics.weights import MOST_ZERO_POINT, stored_zero_points
from fxquant.observers.moments import LayerMoments, damped

ROUNDS = 3
PASSES_A_ROUND = 2  # of coordinate descent in a round
RIDGE = 1e-4  # of the diagonal: holds scales near what they were where the data say nothing
MOST_SCALE_CHANGE = 3.0  # times its former size: a scale beyond has no support in the data


def refine(
    target: Tensor,
    quantized: QuantizedWeight,
    moments: LayerMoments,
    *,
    integer_zero_points: bool = False,
    damping: float = DAMPING,
) -> QuantizedWeight:
    """Lower the layer's squared error further.

    Args:
        target: the float weight to approach, [out, in].
        quantized: where to begin.
        moments: of the layer.
        integer_zero_points: zero points stay whole numbers, if they are not symmetric.
        damping: of the second moments, as for `gptq`.

    Returns:
        Integers, scales and zero points of the same format whose damped squared error is not
        larger; `quantized` itself without tokens.
    """
    if not moments.tokens:
        return quantized
    hessian = damped(moments.hessian, damping)
    hessian /= hessian.diagonal().mean()  # keeps products inside float32 for tiny and huge inputs
    search = _Descent(target.detach().float(), quantized, hessian, integer_zero_points)
    for _ in range(ROUNDS):
        search.refit()
        for _ in range(PASSES_A_ROUND):
            search.descend()
    return search.result()


class _Descent:
    """The current integers and their grid.

    Attributes:
        q: float [in, out].
        scales: [out, groups].
        zero_points: [out, groups].
    """

    def __init__(
        self, target: Tensor, start: QuantizedWeight, hessian: Tensor, whole: bool
    ) -> None:
        self.target, self.hessian, self.start = target.T.contiguous(), hessian, start
        self.columns, self.group_size = start.in_features, start.group_size
        self.integer, self.whole = start.integer, whole
        self.q = start.integers().float().T.contiguous()
        self.scales, self.zero_points = start.scales, start.zero_points

    def descend(self) -> None:
        """One sweep of coordinate descent over all columns."""
        scales, zeros = self._by_column(self.scales), self._by_column(self.zero_points)
        gradient = self.hessian @ ((self.q - zeros).mul_(scales).sub_(self.target))
        reach = (scales * self.hessian.diagonal()[:, None]).reciprocal_()

        def step(i: int, slope: Tensor) -> Tensor:
            best = self.integer.nearest_(self.q[i] - slope * reach[i])
            change = (best - self.q[i]).mul_(scales[i])
            self.q[i] = best
            return change

        lazy_update(gradient, self.hessian, step)

    def refit(self) -> None:
        """The best scales (and zero points) for the integers, where they are better."""
        if self.start.symmetric or self.whole:
            self._offer(self._fitted_scales(self.zero_points), self.zero_points)
        if self.start.symmetric:
            return
        scales, zero_points = self._fitted_grids()
        if self.whole:
            zero_points = stored_zero_points(zero_points, self.integer, True)
            scales = self._fitted_scales(zero_points)
        self._offer(scales, zero_points)

    def _offer(self, scales: Tensor, zero_points: Tensor) -> None:
        """Keep this grid for the rows whose error it lowers."""
        before = self._errors(self.scales, self.zero_points)
        better = (self._errors(scales, zero_points) < before)[:, None]
        self.scales = torch.where(better, scales, self.scales)
        self.zero_points = torch.where(better, zero_points, self.zero_points)

    def result(self) -> QuantizedWeight:
        """What was found."""
        return self.start.with_integers(self.q.T, self.scales, self.zero_points)

    def _errors(self, scales: Tensor, zero_points: Tensor) -> Tensor:
        """The squared error of each row, [out]."""
        difference = (self.q - self._by_column(zero_points)) * self._by_column(scales) - self.target
        return ((self.hessian @ difference) * difference).sum(0)

    def _fitted_scales(self, zero_points: Tensor) -> Tensor:
        """The best scales for these zero points, rounded as stored; the present ones if useless."""
        scales, good = self._solve([self.q - self._by_column(zero_points)], [self.scales])
        return torch.where(good, scales, self.scales)

    def _fitted_grids(self) -> tuple[Tensor, Tensor]:
        """The best scales and zero points together, rounded as stored."""
        former = [self.scales, -self.scales * self.zero_points]
        found, good = self._solve([self.q, torch.ones_like(self.q)], former)
        scales, offsets = found.split(self.scales.shape[1], dim=1)
        zeros = -offsets / scales
        good &= zeros.abs() < MOST_ZERO_POINT
        zeros = torch.where(good, zeros, self.zero_points)
        zeros = stored_zero_points(zeros, self.integer, whole=False)
        return torch.where(good, scales, self.scales), zeros

    def _solve(self, basis: list[Tensor], former: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Factors of each group's `basis` from the normal equations of each row.

        Returns:
            `(factors, good)`: [out, unknowns], of which the first ones are scales, rounded as
            stored, and for each group whether its scale is near the present one.
        """
        groups = group_count(self.columns, self.group_size)
        aim = self.hessian @ self.target  # [in, out]
        normal = torch.cat([self._products(b, basis) for b in basis], 1).double()
        right = torch.cat([self._group_sums(b * aim) for b in basis], 1).double()
        ridge = normal.diagonal(dim1=1, dim2=2) * RIDGE + torch.finfo(torch.float32).tiny
        found, failed = torch.linalg.solve_ex(
            normal + torch.diag_embed(ridge), right + ridge * torch.cat(former, 1).double()
        )
        scales = found[:, :groups].to(SCALE_DTYPE).float()
        ratio = (scales / self.scales).abs()
        # Written so that NaN is bad.
        good = (
            (failed == 0)[:, None] & (ratio < MOST_SCALE_CHANGE) & (ratio > 1 / MOST_SCALE_CHANGE)
        )
        return torch.cat([scales, found[:, groups:].float()], 1), good

    def _products(self, one: Tensor, basis: list[Tensor]) -> Tensor:
        """Products of `one`'s groups with all groups of the basis, [out, groups, unknowns]."""
        rows = []
        for start in range(0, self.columns, self.group_size):
            part = slice(start, start + self.group_size)
            spread = self.hessian[:, part] @ one[part]
            rows.append(torch.cat([self._group_sums(spread * other) for other in basis], 1))
        return torch.stack(rows, 1)

    def _group_sums(self, by_column: Tensor) -> Tensor:
        """[in, out] to [out, groups]; the filled-up part of a short group is zero."""
        columns = by_column.T.contiguous()
        short = self.columns % self.group_size
        if not short:
            return columns.unflatten(1, (-1, self.group_size)).sum(-1)
        padding = self.group_size - short
        return to_groups(torch.nn.functional.pad(columns, (0, padding)), self.group_size).sum(-1)

    def _by_column(self, by_group: Tensor) -> Tensor:
        return expand_groups(by_group, self.group_size, self.columns).T
