"""Functions that may follow a linear layer, under the names and numbers of csrc/linear.h."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
GATED_TOGETHER = 32  # columns of each of two halves that lie side by side: half a block
NUMBERS = {name: number for number, name in enumerate(FUNCTIONS)}


def gate(y: Tensor, function: str) -> Tensor:
    """A function of one half of the columns times the other half.

    Args:
        y: [..., 2 · n]; n is a multiple of 32. Of each 64 columns, 32 belong to the one half and
            32 to the other: see `gate_order`.
        function: one of `FUNCTIONS`.

    Returns:
        [..., n].
    """
    pairs = y.unflatten(-1, (-1, 2, GATED_TOGETHER))
    return (FUNCTIONS[function](pairs[..., 0, :]) * pairs[..., 1, :]).flatten(-2)


def gate_order(size: int) -> Tensor:
    """For each column that `gate` reads, its place in two halves of `size` columns: [2 · size]."""
    return torch.arange(2 * size).view(2, -1, GATED_TOGETHER).transpose(0, 1).flatten()
