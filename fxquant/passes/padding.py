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


def without_padding(mask: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
    """Values of one shape [rows, tokens, ...] without the tokens that are padding.

    A model gives something for padding too, which nobody reads, and to which no layer is fitted.

    Args:
        mask: from `padding_mask`.
        values: of which the first tells whether it has the mask's tokens; if not, and where no
            token is padding, they are returned as they are.
    """
    fitting = fitting_mask(mask, values[0]) if values[0].ndim > 1 else None
    are_alike = all(value.shape == values[0].shape for value in values)
    if fitting is None or not are_alike or bool(fitting.all()):
        return values
    return tuple(value[fitting] for value in values)


def fitting_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask in the shape of the tokens of `x` [..., channels]; None where they are others."""
    if mask is None or x.shape[:-1] not in (mask.shape, (mask.numel(),)):
        return None
    return mask.reshape(x.shape[:-1])
