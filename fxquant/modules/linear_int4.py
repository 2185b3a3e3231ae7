"""A Linear layer with packed group-wise INT4 weights: the width that most layers have."""

import torch
from torch import Tensor, nn

from fxquant.errors import OptionError
from fxquant.modules.linear_intn import QuantizedLinearIntN
from fxquant.modules.saved_weight import FORM
from fxquant.numerics.quantized_weight import QuantizedWeight


class QuantizedLinearInt4(QuantizedLinearIntN):
    """`nn.Linear` with weights x ≈ scale · (q − zero_point), q in 0..15, one scale a group.

    With a code book, q is one of its 16 levels.

    `_packed_weight` is uint8 [out, ceil(in / 2)], low nibble first; see `QuantizedLinearIntN`.
    """

    bits = 4
    _options = (*FORM, "activation", "dtype")

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        activation: str = "float",
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:
        if weight.bits != type(self).bits:
            raise OptionError(
                "QuantizedLinearInt4",
                found=f"a weight of {weight.bits} bits",
                needed="one of 4 bits",
                remedy="Use QuantizedLinearIntN for other weights.",
            )
        super().__init__(weight, bias, activation, weight_dtype)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        group_size: int = 128,
        symmetric: bool = True,
        code_book: str | None = None,
    ) -> "QuantizedLinearInt4":
        """Round the weights of `linear` to nearest.

        Args:
            linear: a float Linear; it is not changed.
            group_size: columns a group; the last group may be short. -1: one group a row.
            symmetric: one fixed zero point, or one for each group.
            code_book: a name of `numerics.code_books.CODE_BOOKS`, or None for integers.

        Raises:
            WeightError: `linear` is no Linear, or its weight is not finite.
            OptionError: `group_size` is neither positive nor -1, or there is no such code book.
        """
        return cls.rounded(linear, cls.bits, group_size, symmetric, code_book)
