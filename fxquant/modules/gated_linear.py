"""A function of one linear layer times another: gate and up of a SwiGLU."""

from torch import Tensor, nn

from fxquant.kernels.functions import gate
from fxquant.modules.linear_intn import QuantizedLinearIntN


class GatedLinear(nn.Module):
    """One linear layer in the place of two that read the same input, a function and a product.

    Args:
        in_features: the width of the input.
        out_features: outputs of each of the two layers, a multiple of 32.
        function: one of `kernels.functions.FUNCTIONS`, applied to the outputs of the first.
        linear: the layer with the rows of both, in the order of `kernels.functions.gate_order`; by
            default a float one without values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        function: str,
        linear: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.function = in_features, out_features, function
        if linear is None:
            linear = nn.Linear(in_features, 2 * out_features, bias=False, device="meta")
        self.linear = linear

    def forward(self, input: Tensor) -> Tensor:
        """Map `input` [..., in] to [..., out]."""
        linear = self._modules["linear"]  # sooner read than an attribute of a module
        assert linear is not None  # for type checkers
        if isinstance(linear, QuantizedLinearIntN):
            return linear.forward_then(input, self.function, is_gated=True)
        product: Tensor = linear(input)
        return gate(product, self.function)

    def extra_repr(self) -> str:
        """The shape, for printing a model."""
        return f"{self.in_features}, {self.out_features}, {self.function}"
