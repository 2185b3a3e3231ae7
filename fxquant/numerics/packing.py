"""Integers of a few bits, packed without gaps: a row is one stream of bits, lowest bit first.

Column c of a row lies at the bits c · bits to c · bits + bits - 1, where bit 8 · i + j is bit j of
byte i. So 4 bits are two nibbles a byte, low nibble first, and 3 bits are 8 columns in 3 bytes.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 8  # columns: so many fill whole bytes in every width


def packed_columns(columns: int, bits: int) -> int:
    """Bytes of a row of `columns` integers.

    >>> [packed_columns(10, bits) for bits in (2, 3, 4, 5, 6, 8)]
    [3, 4, 5, 7, 8, 10]
    """
    return -(-columns * bits // 8)


def pack_codes(q: Tensor, bits: int) -> Tensor:
    """Pack `q` uint8 [rows, columns], each below 2 ** bits, into uint8 [rows, bytes].

    The bits behind the last column of a row are 0.

    >>> import torch
    >>> pack_codes(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()
    [[33, 3]]
    """
    if bits == 8:
        return q
    if bits == 4:
        return _pack_nibbles(q)
    chunks = F.pad(q, (0, -q.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
    word = torch.zeros_like(chunks[..., 0], dtype=torch.int64)
    for i in range(CHUNK):
        word = word | (chunks[..., i].long() << (i * bits))
    packed = torch.stack([(word >> (8 * i) & 0xFF).to(torch.uint8) for i in range(bits)], -1)
    return packed.flatten(1)[:, : packed_columns(q.shape[1], bits)].contiguous()


def unpack_codes(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Undo `pack_codes`: uint8 [rows, bytes] back to uint8 [rows, columns].

    >>> import torch
    >>> unpack_codes(torch.tensor([[33, 3]], dtype=torch.uint8), 3, 4).tolist()
    [[1, 2, 3]]
    """
    if bits == 8:
        return packed
    if bits == 4:
        return _unpack_nibbles(packed, columns)
    chunks = F.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    word = torch.zeros_like(chunks[..., 0], dtype=torch.int64)
    for i in range(bits):
        word = word | (chunks[..., i].long() << (8 * i))
    mask = (1 << bits) - 1
    q = torch.stack([(word >> (i * bits) & mask).to(torch.uint8) for i in range(CHUNK)], -1)
    return q.flatten(1)[:, :columns]


def _pack_nibbles(q: Tensor) -> Tensor:
    if q.shape[1] % 2:
        q = F.pad(q, (0, 1))
    if sys.byteorder == "little":  # two bytes at a time: low | high << 8 becomes low | high << 4
        pairs = q.reshape(-1).view(torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8).view(len(q), -1)
    return q[:, 0::2] | (q[:, 1::2] << 4)


def _unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    if sys.byteorder == "little":  # low | high << 4 becomes low | high << 8
        pairs = packed.to(torch.int16, memory_format=torch.contiguous_format)
        pairs = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F)
        return pairs.view(torch.uint8)[:, :columns]
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)[:, :columns]
