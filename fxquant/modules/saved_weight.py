"""The weight of a packed layer as a file holds it, checked before it is believed."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxquant.modules.linear import FLOAT_DTYPES, check_grid, check_names, check_saved
from fxquant.numerics.code_books import CODE_BITS, CODE_BOOKS, integer_type
from fxquant.numerics.integers import WIDTHS
from fxquant.numerics.quantized_weight import QuantizedWeight

LARGEST_SIZE = 1 << 31
FORM = ("in_features", "group_size", "symmetric")  # of a description
CODE_BOOK = "code_book"  # of the description of a weight that has one


def weight_of_saved(
    where: str, bits: Any, description: dict[str, Any], tensors: dict[str, Tensor]
) -> QuantizedWeight:
    """The weight that a layer's description and tensors are of.

    Args:
        where: the name of the layer's class, for errors.
        bits: of an integer, as saved.
        description: plain data with the names of `FORM`, perhaps `CODE_BOOK`, and the `dtype` of
            the float weight.
        tensors: `packed_weight`, `scales`, and of asymmetric weights `zero_points`; the layer's
            `bias` is checked with them.

    Raises:
        OptionError: they do not fit each other.
    """
    check_names(where, tensors, {"packed_weight", "scales"}, {"zero_points", "bias"})
    weight = _as_saved(where, bits, description, tensors)
    check_grid(where, tensors.get("bias"), weight.scales, weight.zero_points)
    middle = weight.integer.middle
    is_middle = not weight.symmetric or bool((weight.zero_points == middle).all())
    check_saved(where, is_middle, "other zero points", f"{middle:g} everywhere")
    return replace(weight, scales=weight.scales.float(), zero_points=weight.zero_points.float())


def _as_saved(
    where: str, bits: Any, description: dict[str, Any], tensors: dict[str, Tensor]
) -> QuantizedWeight:
    """The weight in the dtypes of the file, whose shapes belong together."""
    in_features, group_size, symmetric = (description[n] for n in FORM)
    sizes = all(type(n) is int and 0 < n <= LARGEST_SIZE for n in (in_features, group_size))
    is_usable = sizes and type(bits) is int and bits in WIDTHS and type(symmetric) is bool
    is_usable = is_usable and description["dtype"] in FLOAT_DTYPES
    is_usable = is_usable and symmetric is ("zero_points" not in tensors)
    code_book = description.get(CODE_BOOK)
    if code_book is not None:
        is_known = isinstance(code_book, str) and code_book in CODE_BOOKS
        is_usable = is_usable and symmetric and bits == CODE_BITS and is_known
    check_saved(where, is_usable, f"the description {description!r:.200}", "sizes and options")
    packed: Any = tensors["packed_weight"]
    scales: Any = tensors["scales"]
    fits = isinstance(packed, Tensor) and isinstance(scales, Tensor) and packed.ndim == 2
    check_saved(where, fits, "no packed weight and scales", "both, as matrices")
    zero_points: Any = tensors.get("zero_points")
    if zero_points is None:
        zero_points = torch.full_like(scales, integer_type(bits, code_book).middle)
    weight = QuantizedWeight(
        packed, scales, zero_points, group_size, in_features, symmetric, bits, code_book
    )
    check_saved(where, packed.dtype == torch.uint8, f"a {packed.dtype} weight", "torch.uint8")
    weight.check_shapes()
    return weight
