"""Values of batches that wait for their turn: in memory up to a bound, else in a file.

The file has no name: whatever ends the process, nothing is left of it. Tensors come back bit for
bit and with the strides they had, and those that shared memory share it again, so that a result
does not depend on the bound.
"""

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from fxquant.errors import CalibrationError

Values = dict[Any, Any]


@dataclass(frozen=True)
class _AwayTensor:
    """A tensor whose memory is in the file.

    Attributes:
        storage: the number of its memory among those of the batch.
        dtype: of an element.
        size: the shape.
        stride: in elements.
        offset: of the first element.
    """

    storage: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _FilePlace:
    """Where a batch lies in the file: each memory's offset and bytes."""

    parts: tuple[tuple[int, int], ...]


class HeldValues:
    """The values of all batches but the one that is running.

    Args:
        most_bytes: that are held in memory; None: no bound.
        shared: tensors that others own (parameters, buffers): their memory is never written out.
    """

    def __init__(self, most_bytes: int | None, shared: Iterable[Tensor] = ()) -> None:
        self.most_bytes, self.held_bytes = most_bytes, 0
        self._shared = {_address(t.detach()) for t in shared if _is_plain(t.detach())}
        self._held: dict[int, tuple[list[Values], int]] = {}
        self._away: dict[int, tuple[list[Values], _FilePlace]] = {}
        self._room: dict[int, tuple[int, int]] = {}  # of a batch: where, and how many bytes
        self._file: IO[bytes] | None = None
        self._end = 0

    def put(self, key: int, values: list[Values]) -> None:
        """Hold the values of a batch.

        Raises:
            CalibrationError: the temporary folder cannot be written.
        """
        memory: dict[int, Tensor] = {}

        def note(tensor: Any) -> Any:
            if self._can_leave(tensor):
                memory.setdefault(_address(tensor), tensor)
            return tensor

        _changed(values, note)
        size = sum(tensor.untyped_storage().nbytes() for tensor in memory.values())
        if self.most_bytes is None or self.held_bytes + size <= self.most_bytes:
            self._held[key] = values, size
            self.held_bytes += size
            return
        numbers = {address: i for i, address in enumerate(memory)}

        def away(leaf: Any) -> Any:
            if not self._can_leave(leaf):
                return leaf
            number = numbers[_address(leaf)]
            return _AwayTensor(number, leaf.dtype, leaf.shape, leaf.stride(), leaf.storage_offset())

        self._away[key] = _changed(values, away), self._write(key, size, memory.values())

    def take(self, key: int) -> list[Values] | None:
        """The values of a batch, which are held no longer; None where none were put."""
        values = self.look(key)
        _, size = self._held.pop(key, (None, 0))
        self.held_bytes -= size
        self._away.pop(key, None)
        return values

    def look(self, key: int) -> list[Values] | None:
        """The values of a batch, which stay held; None where none were put."""
        if key in self._held:
            return self._held[key][0]
        if key not in self._away:
            return None
        values, place = self._away[key]
        memory = [self._read(offset, size) for offset, size in place.parts]

        def back(leaf: Any) -> Any:
            if not isinstance(leaf, _AwayTensor):
                return leaf
            tensor = torch.empty(0, dtype=leaf.dtype)
            return tensor.set_(memory[leaf.storage], leaf.offset, leaf.size, leaf.stride)

        return _changed(values, back)

    @property
    def file_bytes(self) -> int:
        """The size of the file."""
        return self._end

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            self._file.close()

    def _can_leave(self, leaf: Any) -> bool:
        return _is_plain(leaf) and _address(leaf) not in self._shared

    def _write(self, key: int, size: int, tensors: Iterable[Tensor]) -> _FilePlace:
        offset, room = self._room.get(key, (0, 0))
        if room < size:  # a batch that has grown moves to the end
            offset, self._end = self._end, self._end + size
            self._room[key] = offset, size
        parts = []
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="fxquant-", buffering=0)  # noqa: SIM115
            for tensor in tensors:
                data = _bytes_of(tensor.untyped_storage())
                written = 0
                while written < len(data):
                    written += os.pwrite(self._file.fileno(), data[written:], offset + written)
                parts.append((offset, len(data)))
                offset += len(data)
        except OSError as error:
            raise CalibrationError(
                f"the temporary folder {tempfile.gettempdir()!r}",
                found=f"that it cannot be written: {error}",
                needed=f"room for {self._end / 1e9:.1f} GB, which memory= does not hold",
                remedy="Set TMPDIR to a folder with room, or allow more memory.",
            ) from error
        return _FilePlace(tuple(parts))

    def _read(self, offset: int, size: int) -> torch.UntypedStorage:
        assert self._file is not None  # it was written to
        storage = torch.empty(size, dtype=torch.uint8).untyped_storage()
        data, done = _bytes_of(storage), 0
        while done < size:
            done += os.preadv(self._file.fileno(), [data[done:]], offset + done)
        return storage


def _changed(values: list[Values], change: Callable[[Any], Any]) -> list[Values]:
    """The same with every tensor changed that is a value, or is in a tuple that is one.

    Lists and objects stay what they are: two nodes may share one.
    """
    return [{key: _changed_value(value, change) for key, value in part.items()} for part in values]


def _changed_value(value: Any, change: Callable[[Any], Any]) -> Any:
    # No function inside another that calls itself: it would hold what `change` holds, all values of
    # a batch, until Python looks for cycles.
    if type(value) is tuple:
        return tuple(_changed_value(part, change) for part in value)
    return change(value)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor whose bytes are all there is to it."""
    return (
        type(value) is Tensor
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_conj()
        and not value.is_neg()
        and value.untyped_storage().nbytes() > 0
    )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    view = torch.empty(0, dtype=torch.uint8).set_(storage)
    return view.numpy().data
