"""How many tokens meet other experts in the quantized model than in the float one.

A mixture's router chooses experts by differences of scores. Where these are small, as with random
weights, a little error makes it choose others, and that is then most of the output's error.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxquant.passes.padding import without_padding


@dataclass
class ChosenExperts:
    """How many tokens were compared at one choice of experts, and how many chose others."""

    tokens: int = 0
    changed: int = 0

    def add(self, expected: Any, found: Any, mask: Tensor | None = None) -> None:
        """Compare what the choice gave in both models: numbers of experts, in any order.

        Args:
            expected: by the float model.
            found: by the quantized one.
            mask: of the tokens that are no padding, or None.
        """
        one, other = _numbers(expected), _numbers(found)
        if one is None or other is None or one.shape != other.shape:
            return
        one, other = without_padding(mask, one, other)
        is_other = (one.sort(-1).values != other.sort(-1).values).any(-1)
        self.tokens += is_other.numel()
        self.changed += int(is_other.sum())

    def merge(self, other: "ChosenExperts") -> None:
        """Add the tokens of other batches."""
        self.tokens += other.tokens
        self.changed += other.changed


def _numbers(value: Any) -> Tensor | None:
    """The numbers [..., chosen] that a choice gave."""
    if isinstance(value, Tensor):
        return value.unsqueeze(-1)  # of argmax: one for each token
    if isinstance(value, tuple | list) and len(value) > 1 and isinstance(value[1], Tensor):
        return value[1]
    return None
