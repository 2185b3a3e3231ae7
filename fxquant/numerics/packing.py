"""Two 4-bit integers in a byte, low nibble first."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_nibbles(q: Tensor) -> Tensor:
    """Pack `q` uint8 [rows, columns] with values 0..15 into uint8 [rows, ceil(columns / 2)].

    Column 0 goes to the low nibble of byte 0. The high nibble of an odd last column is 0.

    >>> import torch
    >>> pack_nibbles(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist()
    [[33, 3]]
    """
    if q.shape[1] % 2:
        q = F.pad(q, (0, 1))
    if sys.byteorder == "little":  # two bytes at a time: low | high << 8 becomes low | high << 4
        pairs = q.reshape(-1).view(torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8).view(len(q), -1)
    return q[:, 0::2] | (q[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Undo `pack_nibbles`: uint8 [rows, ceil(columns / 2)] back to uint8 [rows, columns].

    >>> import torch
    >>> unpack_nibbles(torch.tensor([[33, 3]], dtype=torch.uint8), 3).tolist()
    [[1, 2, 3]]
    """
    if sys.byteorder == "little":  # low | high << 4 becomes low | high << 8
        pairs = packed.to(torch.int16, memory_format=torch.contiguous_format)
        pairs = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F)
        return pairs.view(torch.uint8)[:, :columns]
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)[:, :columns]
