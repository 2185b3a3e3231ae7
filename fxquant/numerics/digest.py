"""A digest of a tensor at the speed of memory: has a bit of it changed since it was saved?

It notices damage, not malice: who can write a file can write its digest. SHA-256 of everything
would take longer than reading; so a long tensor is first folded into one block:

    fold = block_0 · P^(n-1) + block_1 · P^(n-2) + … + block_(n-1)    (mod 2^64, word by word)

P is odd, so that a change of one word always changes the fold, and blocks that change places do
too. The digest is SHA-256 of the name, the dtype, the shape, the fold and what is left over.
"""

import hashlib

import torch
from torch import Tensor

WORDS = 1 << 14  # of a block
BLOCK_BYTES = 8 * WORDS  # bytes
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, as a signed word


class Digest:
    """The digest of one tensor, whose bytes come in pieces."""

    def __init__(self, name: str, dtype: str, shape: list[int]) -> None:
        self._hash = hashlib.sha256(repr((name, dtype, list(shape))).encode())
        self._fold: Tensor | None = None

    def update(self, data: Tensor) -> None:
        """Add bytes, uint8 [n]; each piece but the last is a multiple of `BLOCK_BYTES`."""
        whole = data.numel() // BLOCK_BYTES * BLOCK_BYTES
        if whole:
            if self._fold is None:
                self._fold = torch.zeros(WORDS, dtype=torch.int64, device="cpu")
            fold = self._fold
            for block in data[:whole].view(torch.int64).view(-1, WORDS):
                torch.add(block, fold, alpha=_FACTOR, out=fold)
        if whole < data.numel():
            self._hash.update(data[whole:].numpy().data)

    def hexdigest(self) -> str:
        """The digest of what was added."""
        made = self._hash.copy()
        if self._fold is not None:
            made.update(self._fold.numpy().data)
        return made.hexdigest()


def digest_of(name: str, dtype: str, tensor: Tensor) -> str:
    """The digest of a whole tensor, wherever it lies."""
    made = Digest(name, dtype, list(tensor.shape))
    made.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
    return made.hexdigest()


def text_digest(text: str) -> str:
    """The digest of the description."""
    return hashlib.sha256(text.encode()).hexdigest()
