"""The safetensors container, read byte by byte and checked as it is read.

Everything comes from one open file: what was checked is what is used, even if another process
writes to the path meanwhile. Each tensor gets memory of its own, aligned as torch aligns it (some
kernels round differently at other alignments), and its digest is made while its bytes are still in
the cache.
"""

import io
import json
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import LoadError, cause_of, check_path
from fxquant.numerics.digest import BLOCK_BYTES, Digest
from fxquant.report.atomic import kind_of

LENGTH_BYTES = 8  # of the header's length, at the start
LARGEST_HEADER = 100_000_000  # safetensors' own limit
PIECE = 8 * BLOCK_BYTES  # bytes that are read at once
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
MOST_DIMENSIONS = 64


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the file."""

    name: str
    dtype: str
    shape: list[int]
    start: int
    end: int


class Container:
    """An open safetensors file; use it as a context.

    Attributes:
        metadata: the texts in the header.
        entries: where the tensors lie, in the order of their bytes.

    Raises:
        LoadError: it is no regular file, or its header does not describe it from end to end.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_path("path", path, LoadError)
        self._where = os.fspath(path)
        self._file = self._open()
        try:
            self.metadata, self.entries = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tensor(self, entry: Entry) -> tuple[Tensor, str]:
        """The tensor of an entry, and the digest of its bytes.

        Raises:
            LoadError: the file ends before it, or it holds booleans that are neither 0 nor 1.
        """
        size = entry.end - entry.start
        data = torch.empty(size, dtype=torch.uint8, device="cpu")
        view = data.numpy().data
        made = Digest(entry.name, entry.dtype, entry.shape)
        self._file.seek(entry.start)
        for start in range(0, size, PIECE):
            end = min(start + PIECE, size)
            self._fill(view[start:end])
            made.update(data[start:end])
        if entry.dtype == "BOOL" and size and int(data.max()) > 1:
            raise not_readable(f"{self._where}: tensor {entry.name!r}", "a boolean that is no bit")
        return data.view(SAFETENSORS_DTYPES[entry.dtype]).view(entry.shape), made.hexdigest()

    def _fill(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise not_readable(self._where, "a file that ends before its last tensor")
            done += count

    def _open(self) -> io.FileIO:
        try:
            # A FIFO would wait for a writer, and a device may do anything: look before opening.
            check_regular(os.stat(self._where).st_mode, self._where)
            file = open(self._where, "rb", buffering=0)  # noqa: SIM115
        except (OSError, ValueError) as error:
            raise not_readable(self._where, f"that reading it failed: {cause_of(error)}") from error
        return file

    def _read_header(self) -> tuple[dict[str, str], list[Entry]]:
        status = os.fstat(self._file.fileno())
        check_regular(status.st_mode, self._where)
        length = int.from_bytes(self._file.read(LENGTH_BYTES), "little")
        if status.st_size < LENGTH_BYTES or length > min(
            status.st_size - LENGTH_BYTES, LARGEST_HEADER
        ):
            found = f"{status.st_size} bytes that are no safetensors file"
            raise not_readable(self._where, found)
        text = bytearray(length)
        self._fill(memoryview(text))
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise not_readable(self._where, f"a header that is no JSON ({error})") from error
        if not isinstance(header, dict):
            raise not_readable(self._where, "a header that is no mapping")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise not_readable(self._where, "metadata that is no text")
        entries = [self._entry(name, value) for name, value in header.items()]
        entries.sort(key=lambda entry: (entry.start, entry.end))
        place = 0
        for entry in entries:
            if entry.start != place:
                raise not_readable(
                    f"{self._where}: tensor {entry.name!r}", "bytes that belong to no tensor or two"
                )
            place = entry.end
        if LENGTH_BYTES + length + place != status.st_size:
            found = f"{status.st_size} bytes instead of {LENGTH_BYTES + length + place}"
            raise not_readable(self._where, found)
        begin = LENGTH_BYTES + length
        return metadata, [
            Entry(e.name, e.dtype, e.shape, e.start + begin, e.end + begin) for e in entries
        ]

    def _entry(self, name: str, value: Any) -> Entry:
        where = f"{self._where}: tensor {name!r:.200}"
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise not_readable(where, "an entry without dtype, shape and place")
        dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
            raise not_readable(where, f"the dtype {dtype!r:.40}")
        if not _are_sizes(shape, MOST_DIMENSIONS) or not _are_sizes(place, 2) or len(place) != 2:
            raise not_readable(where, f"the shape {shape!r:.80} at {place!r:.80}")
        if place[1] - place[0] != math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize:
            raise not_readable(where, f"{place[1] - place[0]} bytes for {dtype} {shape}")
        return Entry(name, dtype, shape, *place)


def _are_sizes(value: Any, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(size) is int and 0 <= size < 1 << 62 for size in value)
    )


def check_regular(mode: int, where: str) -> None:
    """Raise a `LoadError` unless `mode` is that of a regular file."""
    kind = kind_of(mode)
    if kind is not None:
        raise not_readable(where, kind)


def not_readable(where: str, found: str) -> LoadError:
    """The error for a file that is not as `save_model` wrote it."""
    return LoadError(
        where,
        found=found,
        needed="a whole file that fxquant.save_model wrote",
        remedy="Check the path; if the file is damaged, copy or save it again.",
    )
