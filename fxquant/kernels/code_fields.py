"""How integers of 2 to 8 bits lie in the kernel's memory, apart from 4: see csrc/codes.h.

A width is a sum of fields: 4, 2 or 8 bits, and for 3, 5 and 6 bits the remaining upper ones. A word
is a lane of four bytes for each output; it holds a field of several inputs: byte j has input j in
its lowest bits, then input 4 + j, and so on. A unit of inputs fills whole words of every field.
"""

import torch
from torch import Tensor

BYTES = 4  # of a lane, and inputs that a shift and a mask give at once

_FIELDS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # the lowest first


def unit_inputs(bits: int) -> int:
    """Inputs of a unit: a multiple of eight, since that many are multiplied at a time.

    >>> [unit_inputs(bits) for bits in (2, 3, 4, 5, 6, 8)]
    [16, 32, 8, 32, 16, 8]
    """
    return max(8, 32 // _FIELDS[bits][-1])


def to_words(q: Tensor, bits: int) -> Tensor:
    """Integers uint8 [..., inputs] as the bytes of words, uint8 [..., units, words, 4]."""
    units = q.unflatten(-1, (-1, unit_inputs(bits)))
    words, start = [], 0
    for width in _FIELDS[bits]:
        field = ((units >> start) & ((1 << width) - 1)).unflatten(-1, (-1, 8 // width, BYTES))
        words.append((field << _places(width, q.device)).sum(-2, dtype=torch.uint8))
        start += width
    return torch.cat(words, -2)


def from_words(words: Tensor, bits: int) -> Tensor:
    """Undo `to_words`: uint8 [..., units, words, 4] back to uint8 [..., inputs]."""
    fields = _FIELDS[bits]
    counts = [unit_inputs(bits) * width // 32 for width in fields]
    units, start = [], 0
    for width, part in zip(fields, words.split(counts, -2), strict=True):
        field = (part[..., None, :] >> _places(width, words.device)) & ((1 << width) - 1)
        units.append(field.flatten(-3) << start)
        start += width
    return sum(units[1:], units[0]).flatten(-2)


def _places(width: int, device: torch.device) -> Tensor:
    """Where the fields of a byte start, [fields, 1]."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)[:, None]
