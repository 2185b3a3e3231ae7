"""Linear layers that read one value, as one layer whose output is cut into theirs."""

import torch
from torch import Tensor, nn


class FusedLinear(nn.Module):
    """One linear layer in the place of several that read the same input.

    The rows of their weights lie one below the other, so that the input is prepared once.

    Args:
        in_features: the width of the input.
        sizes: outputs of each layer.
        linear: the layer with all rows; by default a float one without values.
    """

    def __init__(
        self, in_features: int, sizes: tuple[int, ...], linear: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.sizes = in_features, tuple(sizes)
        if linear is None:
            linear = nn.Linear(in_features, sum(sizes), bias=False, device="meta")
        self.linear = linear

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Map `input` [..., in] to the layers' outputs, views [..., size] of one tensor."""
        return torch.split_with_sizes(self.linear(input), self.sizes, -1)

    def extra_repr(self) -> str:
        """The shape, for printing a model."""
        return f"{self.in_features}, {self.sizes}"
