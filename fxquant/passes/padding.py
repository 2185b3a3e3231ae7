"""Tokens that do not count: padding, as an attention mask tells it."""

from torch import Tensor

from fxquant.graph.calls import Call

ARGUMENT = "attention_mask"


def padding_mask(call: Call) -> Tensor | None:
    """What a call says of padding: its own `padding`, or a two-dimensional `attention_mask`."""
    if call.padding is not None:
        return call.padding
    given = call.kwargs.get(ARGUMENT)
    return given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None


def fitting_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask in the shape of the tokens of `x` [..., channels]; None where they are others."""
    if mask is None or x.shape[:-1] not in (mask.shape, (mask.numel(),)):
        return None
    return mask.reshape(x.shape[:-1])
