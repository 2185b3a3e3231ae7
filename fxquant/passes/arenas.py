"""Memory that lasts for values that wait, apart from that of values that come and go.

Where both lie side by side, an allocator is left with gaps between what lasts, which are too small
for what comes next: a process then grows to twice of what it holds. Here all that a batch leaves
behind is copied into one mapping, and mappings are used again.
"""

import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, UntypedStorage

ALIGNMENT = 64  # bytes, as torch's own allocator aligns


class Arenas:
    """Mappings, each of which is lent until no tensor uses it any more."""

    def __init__(self) -> None:
        self._all: list[_Arena] = []

    def copies(self, storages: Sequence[UntypedStorage]) -> list[UntypedStorage]:
        """Copies of some memory, each of its own size, side by side.

        Args:
            storages: on the CPU, none of them empty.
        """
        room = sum(_aligned(storage.nbytes()) for storage in storages)
        view = self._borrowed(room)
        made, offset = [], 0
        for storage in storages:
            size = storage.nbytes()
            copy = torch.frombuffer(view, dtype=torch.uint8, count=size, offset=offset)
            copy.copy_(bytes_of(storage))
            made.append(copy.untyped_storage())
            offset += _aligned(size)
        return made

    @property
    def nbytes(self) -> int:
        """Of all mappings."""
        return sum(len(arena.memory) for arena in self._all)

    def _borrowed(self, room: int) -> memoryview:
        """A free mapping of at least `room` bytes."""
        free = [arena for arena in self._all if arena.is_free]
        large = [arena for arena in free if len(arena.memory) >= room]
        if large:
            return min(large, key=lambda arena: len(arena.memory)).lent()
        if free:  # batches have grown: a larger one takes its place
            self._all.remove(max(free, key=lambda arena: len(arena.memory)))
        self._all.append(_Arena(room))
        return self._all[-1].lent()


class _Arena:
    """One mapping.

    Args:
        room: bytes.
    """

    def __init__(self, room: int) -> None:
        private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
        options = {"flags": private} if private else {}  # Windows has neither
        self.memory = mmap.mmap(-1, max(room, 1), **options)
        self._borrower: weakref.ref[memoryview] | None = None

    @property
    def is_free(self) -> bool:
        """Whether no tensor uses it: each keeps the view that it was made of."""
        return self._borrower is None or self._borrower() is None

    def lent(self) -> memoryview:
        """All of it."""
        view = memoryview(self.memory)
        self._borrower = weakref.ref(view)
        return view


def bytes_of(storage: UntypedStorage) -> Tensor:
    """The bytes of a memory, uint8 [n], not copied."""
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
