"""An `nn.Linear` around tensors that exist: nothing is copied."""

from typing import Any

from torch import Tensor, nn


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """`tensor` itself if it is a parameter, else one on its memory that needs no gradient."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=False)


def linear_around(weight: Any, bias: Any) -> nn.Linear:
    """A layer in eval mode.

    Args:
        weight: [out, in].
        bias: [out], or None.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = as_parameter(weight)
    if bias is not None:
        linear.bias = as_parameter(bias)
    return linear.eval()
