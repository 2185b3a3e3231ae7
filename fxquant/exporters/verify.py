"""Weights read back from what was written: a file that holds other numbers is not put in place.

The readers share no code with the writers: each word is taken apart by shifts.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fxquant.errors import SaveError
from fxquant.modules.linear import QuantizedLinear
from fxquant.numerics.quantized_weight import QuantizedWeight


def verify_weights(
    layers: Iterable[tuple[str, QuantizedLinear | QuantizedWeight]], read: Callable[[str], Tensor]
) -> None:
    """Compare each layer's weight with the one that `read` finds in the new files.

    Args:
        layers: the layers by name, or their weights.
        read: gives the float32 weight [out, in] of a name.

    Raises:
        SaveError: one differs.
    """
    for name, layer in layers:
        expected, found = layer.dequantize().cpu(), read(name)
        if expected.shape == found.shape and torch.equal(expected, found.float()):
            continue
        raise SaveError(
            name,
            found="other weights in the files than in the model",
            needed="the same weights",
            remedy="Nothing was put in place. Report this as a bug of fxquant.",
        )


def read_words(words: Tensor, bits: int, nibbles: Iterable[int] | None = None) -> Tensor:
    """The unsigned integers in `words` int32 [rows, n], as uint8 [rows, n · 32 / bits].

    Args:
        words: the packed integers.
        bits: of one of them, at most 8.
        nibbles: where in a word each of its columns is; by default in order.
    """
    places = list(nibbles) if nibbles is not None else range(32 // bits)
    mask = 2**bits - 1
    columns = torch.empty(*words.shape, len(places), dtype=torch.uint8)
    for number, place in enumerate(places):
        columns[..., number] = (words >> (place * bits)).bitwise_and_(mask)
    return columns.flatten(1)
