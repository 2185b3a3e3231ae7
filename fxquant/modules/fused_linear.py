"""A linear layer with what a graph computes around it: layers that read its input, a function."""

import torch
from torch import Tensor, nn

from fxquant.kernels.functions import FUNCTIONS
from fxquant.modules.linear_intn import QuantizedLinearIntN


class FusedLinear(nn.Module):
    """One linear layer in the place of several that read the same input, or of one and a function.

    The rows of several layers' weights lie one below the other, so that the input is prepared once.

    Args:
        in_features: the width of the input.
        sizes: outputs of each layer.
        function: one of `kernels.functions.FUNCTIONS`, applied to all outputs.
        linear: the layer with all rows; by default a float one without values.
    """

    def __init__(
        self,
        in_features: int,
        sizes: tuple[int, ...],
        function: str = "none",
        linear: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.sizes, self.function = in_features, tuple(sizes), function
        if linear is None:
            linear = nn.Linear(in_features, sum(sizes), bias=False, device="meta")
        self.linear = linear

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map `input` [..., in] to the layers' outputs, views [..., size] of one tensor.

        The output of a single layer is returned as it is.
        """
        linear = self._modules["linear"]  # sooner read than an attribute of a module
        assert linear is not None  # for type checkers
        if self.function == "none":
            output = linear(input)
        elif isinstance(linear, QuantizedLinearIntN):
            output = linear.forward_then(input, self.function)
        else:
            output = FUNCTIONS[self.function](linear(input))
        if len(self.sizes) == 1:
            return output
        return torch.split_with_sizes(output, self.sizes, -1)

    def extra_repr(self) -> str:
        """The shape, for printing a model."""
        function = "" if self.function == "none" else f", {self.function}"
        return f"{self.in_features}, {self.sizes}{function}"
