"""Integers packed into 32-bit words, as compressed-tensors, GPTQ and AWQ store them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.config.targets import WORD

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns is in nibble i


def pack_rows(q: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Pack `q` [rows, columns], values 0..2^bits − 1, into int32 [rows, ceil(columns · bits / 32)].

    Args:
        q: integers; missing columns of the last word become 0.
        bits: 4 or 8.
        order: which column of a word is in its lowest bits, then in the next; by default in order.

    >>> import torch
    >>> [hex(word) for word in pack_rows(torch.tensor([[1, 2, 3, 4, 5, 6, 7]]), 4)[0]]
    ['0x7654321']
    """
    count = WORD // bits
    q = F.pad(q, (0, -q.shape[1] % count)).unflatten(1, (-1, count))
    words = torch.zeros(q.shape[:2], dtype=torch.int32)
    for place, column in enumerate(range(count) if order is None else order):
        words |= q[..., column].to(torch.int32) << (place * bits)  # the last reaches the sign
    return words
