"""The multiple-choice knapsack: one width for each item, least summed error, cost within a budget.

Solved by dynamic programming over the budget, in `STEPS` steps of what it allows above the cheapest
choices; costs are rounded up to whole steps, so the budget is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

STEPS = 4096


@dataclass(frozen=True)
class Item:
    """What one width is chosen for.

    Attributes:
        costs: by width.
        errors: by the same widths.
    """

    costs: dict[int, float]
    errors: dict[int, float]

    @property
    def least(self) -> float:
        """The cheapest cost."""
        return min(self.costs.values())


def least_errors(items: Sequence[Item], budget: float) -> list[int] | None:
    """A width for each item, or None where even the cheapest ones cost more than the budget.

    >>> items = [Item({4: 4, 8: 8}, {4: 1.0, 8: 0.1}), Item({4: 4, 8: 8}, {4: 3.0, 8: 0.1})]
    >>> least_errors(items, 12), least_errors(items, 7)
    ([4, 8], None)
    """
    spare = budget - sum(item.least for item in items)
    if spare < 0:
        return None
    unit = spare / STEPS
    best = torch.zeros(STEPS + 1, dtype=torch.float64)
    picks: list[torch.Tensor] = []
    for item in items:
        options = []
        for width, error in item.errors.items():
            steps = _steps(item, width, unit)
            shifted = torch.full_like(best, torch.inf)
            if steps <= STEPS:
                shifted[steps:] = best[: STEPS + 1 - steps] + error
            options.append(shifted)
        best, pick = torch.stack(options).min(0)
        picks.append(pick)
    place, found = STEPS, list[int]()
    for item, pick in zip(reversed(items), reversed(picks), strict=True):
        width = list(item.errors)[int(pick[place])]
        found.append(width)
        place -= _steps(item, width, unit)
    return found[::-1]


def _steps(item: Item, width: int, unit: float) -> int:
    """What a width costs above the cheapest one, in whole steps."""
    extra = item.costs[width] - item.least
    if extra <= 0:
        return 0
    return STEPS + 1 if extra > unit * STEPS else math.ceil(extra / unit - 1e-6)
