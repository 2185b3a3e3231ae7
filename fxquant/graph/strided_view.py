"""Overlapping windows of a tensor, in place of an op that can leave the tensor's memory."""

from collections.abc import Sequence

from torch import Tensor

from fxquant.errors import ShapeError
from fxquant.graph.structures import graph_function


@graph_function
def strided_view(
    input: Tensor, size: Sequence[int], stride: Sequence[int], order: Sequence[int] | None = None
) -> Tensor:
    """What `input.as_strided(size, stride)` is, where that is a view of `input` alone.

    Args:
        input: any shape, without gaps in memory.
        size: of the view, one number a dimension.
        stride: how many elements of `input` lie between neighbours, one number a dimension.
        order: the dimensions of `input` as they lie in memory, the outermost first; None where they
            lie in their own order.

    Returns:
        A view of that size, which shares the memory of `input`.

    Raises:
        ShapeError: the view would hold elements that are not of `input`, or `input` lies in memory
            in another way, so that the strides would mean other elements.
    """
    size, stride = tuple(size), tuple(stride)
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=False))
    fits = 0 in size or last < input.numel()
    is_view = len(size) == len(stride) and min((0, *size, *stride)) >= 0 and fits
    lies = input if order is None else input.permute(tuple(order))
    if not is_view or not lies.is_contiguous():
        raise ShapeError(
            "strided_view",
            found=f"strides {stride} and size {size} of a tensor of shape {tuple(input.shape)} "
            f"and strides {input.stride()}",
            needed="windows of a tensor without gaps that end inside of it, and the order of "
            "dimensions in memory for which the model was traced",
            remedy="Pass inputs of a shape for which the model was traced.",
        )
    return input.as_strided(size, stride)
