"""An einsum with a weight as the linear layer it is.

`bsd,dhk->bshk` maps the last dimension of the input, d, to h·k outputs; `bshk,hkd->bsd` maps the
last two, h and k, to d. In both the weight is a matrix [outputs, inputs] after a rearrangement.
"""

import math

from torch import Tensor


def linear_form(
    equation: str, weight: Tensor, *, swapped: bool
) -> tuple[Tensor, int, tuple[int, ...]] | None:
    """The matrix of an einsum of an input and a weight.

    Args:
        equation: without spaces; letters and, for leading dimensions of the input, `...`.
        weight: the weight operand.
        swapped: whether the weight is the first operand.

    Returns:
        The matrix [out, in], how many last dimensions of the input it maps, and the sizes of the
        dimensions that they become; None where the einsum is no linear layer.
    """
    operands, arrow, output = equation.partition("->")
    parts = operands.split(",")
    if not arrow or len(parts) != 2:
        return None
    of_input, of_weight = (parts[1], parts[0]) if swapped else (parts[0], parts[1])
    if "." in of_weight or len(set(of_weight)) != len(of_weight) or len(of_weight) != weight.ndim:
        return None
    contracted = [c for c in of_weight if c not in output]
    made = [c for c in of_weight if c in output]
    count = len(contracted)
    prefix = of_input[:-count] if count else of_input
    order = list(of_input[-count:]) if count else []
    is_linear = (
        count > 0
        and bool(made)
        and sorted(order) == sorted(contracted)
        and not set(prefix) & set(of_weight)
        and output.startswith(prefix)
        and sorted(output[len(prefix) :]) == sorted(made)
    )
    if not is_linear:
        return None
    made = list(output[len(prefix) :])
    axes = [of_weight.index(c) for c in (*made, *order)]
    sizes = tuple(weight.shape[of_weight.index(c)] for c in made)
    matrix = weight.permute(axes).reshape(math.prod(sizes), -1)
    return matrix, count, sizes
