"""A quantized matrix: the one description that algorithms, layers, files and exporters share.

Values are x ≈ scale · (q − zero_point) with q of 2, 3, 4, 5, 6 or 8 bits. Groups run along the
inputs. Scales are stored in bfloat16 and zero points in float16, so both are rounded to these
formats before the integers are chosen: what is stored is exactly what the integers were fitted to.

- symmetric: the zero point is 2 ** (bits - 1) everywhere. The scale carries a sign, so that the
  element of largest magnitude in a group sits on the outermost level, and all levels are used
  (llama.cpp's Q4_0 does the same).
- asymmetric: a zero point for each group, not whole: a weight needs no exact zero, and on Gaussian
  weights at 4 bits that is worth 0.4 dB after a clip search.
- with a code book: symmetric, and q one of 16 integers of 8 bits, which are not equally far apart
  (see `code_books`). What is stored of q is its number among them, 4 bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.errors import OptionError
from fxquant.numerics.code_books import integer_type
from fxquant.numerics.grouping import from_groups, group_count
from fxquant.numerics.integers import IntegerType
from fxquant.numerics.packing import pack_codes, packed_columns, unpack_codes

SCALE_DTYPE = torch.bfloat16  # float32's range: no weight is too small for it
ZERO_POINT_DTYPE = torch.float16
ONE_GROUP = -1  # instead of a group size: all inputs of a row share a scale
BLOCK_ELEMENTS = 1 << 20  # of a block of rows: its temporaries stay in the cache


def check_group_size(group_size: object) -> None:
    """Raise an `OptionError` unless `group_size` is positive, or -1 for one group a row."""
    is_bool = isinstance(group_size, bool)
    if is_bool or not isinstance(group_size, int) or (group_size < 1 and group_size != ONE_GROUP):
        raise OptionError(
            "group_size",
            found=repr(group_size),
            needed=f"a whole number of at least 1, or {ONE_GROUP} for one group a row",
            remedy="128 and 32 are usual.",
        )


def check_symmetric(code_book: str | None, symmetric: bool) -> None:
    """Raise an `OptionError` if a code book is asked for with a zero point for each group."""
    if code_book is not None and not symmetric:
        raise OptionError(
            "symmetric",
            found=f"False with the code book {code_book!r}",
            needed="True: the levels of a code book lie around zero",
            remedy="Leave symmetric out, or code_book.",
        )


def resolved_group_size(group_size: int, in_features: int) -> int:
    """Columns a group: all `in_features` where `group_size` is -1.

    Raises:
        OptionError: `group_size` is neither positive nor -1.
    """
    check_group_size(group_size)
    return in_features if group_size == ONE_GROUP else group_size


def is_per_channel(bits: int, group_size: int, in_features: int) -> bool:
    """Whether a layer gets INT8 with one scale a row: at 8 bits, or where no group is full."""
    return bits == 8 or in_features < group_size


def saved_bytes(shape: tuple[int, int], bits: int, group_size: int, symmetric: bool) -> int:
    """Bytes of a weight [out, in] in a file.

    >>> saved_bytes((256, 512), bits=3, group_size=128, symmetric=True) / (256 * 512 / 8)
    3.125122...
    """
    groups = shape[0] * group_count(shape[1], group_size)
    zero_points = 1 if symmetric else groups
    grid = SCALE_DTYPE.itemsize * groups + ZERO_POINT_DTYPE.itemsize * zero_points
    return shape[0] * packed_columns(shape[1], bits) + grid


def rows_of_block(columns: int, elements: int = BLOCK_ELEMENTS) -> int:
    """How many rows of a matrix to work on at a time, so that temporaries stay in the cache."""
    return max(1, elements // max(columns, 1))


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix [out, in].

    Attributes:
        packed: uint8 [out, ceil(in · bits / 8)], see `packing`.
        scales: float32 [out, groups], representable in bfloat16.
        zero_points: float32 [out, groups], representable in float16.
        group_size: columns a group; the last group may be short.
        in_features: the number of columns.
        symmetric: whether every zero point is `integer.middle`.
        bits: of what is stored of an integer: 2, 3, 4, 5, 6 or 8.
        code_book: the name of the integers that there are, in `code_books`; None: all of the width.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor
    group_size: int
    in_features: int
    symmetric: bool
    bits: int
    code_book: str | None = None

    @classmethod
    def from_integers(
        cls,
        q: Tensor,
        scales: Tensor,
        zero_points: Tensor,
        *,
        bits: int,
        group_size: int,
        symmetric: bool,
    ) -> "QuantizedWeight":
        """Pack integers `q` uint8 [out, in] with their scales and zero points [out, groups]."""
        packed = pack_codes(q, bits)
        return cls(packed, scales, zero_points, group_size, q.shape[1], symmetric, bits)

    def with_integers(self, q: Tensor, scales: Tensor, zero_points: Tensor) -> "QuantizedWeight":
        """Another weight of this form: integers [out, in], scales and zero points [out, groups]."""
        return replace(self, packed=self._packed(q), scales=scales, zero_points=zero_points)

    def _packed(self, q: Tensor) -> Tensor:
        return pack_codes(self.integer.codes_of(q.to(torch.uint8).contiguous()), self.bits)

    @classmethod
    def empty(
        cls,
        weight: Tensor,
        *,
        bits: int,
        group_size: int,
        symmetric: bool,
        code_book: str | None = None,
    ) -> "QuantizedWeight":
        """Memory for the quantized form of `weight` [out, in].

        Results are written there block by block: small blocks that stay would cut memory to pieces.

        Raises:
            OptionError: there are no integers of so many bits, `group_size` is not usable, or
                the code book has another width or is asked for with zero points.
        """
        integer_type(bits, code_book)
        check_symmetric(code_book, symmetric)
        out_features, in_features = weight.shape
        group_size = resolved_group_size(group_size, in_features)
        groups = group_count(in_features, group_size)
        device = weight.device
        shape = (out_features, packed_columns(in_features, bits))
        packed = torch.empty(shape, dtype=torch.uint8, device=device)
        scales, zeros = torch.empty(2, out_features, groups, dtype=torch.float32, device=device)
        return cls(packed, scales, zeros, group_size, in_features, symmetric, bits, code_book)

    @property
    def integer(self) -> IntegerType:
        """The integers that there are."""
        return integer_type(self.bits, self.code_book)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return len(self.packed), self.in_features

    @property
    def nbytes(self) -> int:
        """Bytes in a file; the zero points of symmetric weights are one number."""
        return saved_bytes(self.shape, self.bits, self.group_size, self.symmetric)

    def integers(self) -> Tensor:
        """The integers, uint8 [out, in]."""
        return self.integer.of_codes(unpack_codes(self.packed, self.in_features, self.bits))

    def fill(self, q: Tensor, scales: Tensor, zero_points: Tensor) -> None:
        """Write integers [out, in], scales and zero points [out, groups] into this memory."""
        self.packed.copy_(self._packed(q))
        self.scales.copy_(scales)
        self.zero_points.copy_(zero_points)

    def copy_(self, other: "QuantizedWeight") -> None:
        """Write another weight of the same format into this memory."""
        self.packed.copy_(other.packed)
        self.scales.copy_(other.scales)
        self.zero_points.copy_(other.zero_points)

    def split(self, rows: int) -> list["QuantizedWeight"]:
        """The weight in parts of `rows` rows, which share its memory; the last may be shorter."""
        return [
            replace(self, packed=packed, scales=scales, zero_points=zero_points)
            for packed, scales, zero_points in zip(
                self.packed.split(rows),
                self.scales.split(rows),
                self.zero_points.split(rows),
                strict=True,
            )
        ]

    def clone(self) -> "QuantizedWeight":
        """The same on memory of its own."""
        tensors = self.packed, self.scales, self.zero_points
        packed, scales, zero_points = (tensor.clone() for tensor in tensors)
        return replace(self, packed=packed, scales=scales, zero_points=zero_points)

    def rows(self, places: Tensor) -> "QuantizedWeight":
        """Some rows; `places` are whole numbers [n] in 0..out - 1."""
        grid = self.scales[places], self.zero_points[places]
        return replace(self, packed=self.packed[places], scales=grid[0], zero_points=grid[1])

    def values(self) -> Tensor:
        """The float32 weight [out, in], all rows at once: for few rows."""
        size = min(self.group_size, self.in_features)
        q = F.pad(self.integers(), (0, -self.in_features % size)).unflatten(1, (-1, size))
        groups = torch.sub(q, self.zero_points.float()[..., None])
        return from_groups(groups.mul_(self.scales.float()[..., None]), self.in_features)

    def parts(self) -> Iterator[Tensor]:
        """The rows of the float32 weight in order, some at a time: memory stays small."""
        for part in self.split(rows_of_block(self.in_features)):
            yield part.values()

    @classmethod
    def joined(cls, parts: Sequence["QuantizedWeight"]) -> "QuantizedWeight":
        """Undo `split`: the rows of weights of one form, one below the other."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*((p.packed, p.scales, p.zero_points) for p in parts), strict=True)
        packed, scales, zero_points = map(torch.cat, columns)
        return replace(parts[0], packed=packed, scales=scales, zero_points=zero_points)

    def dequantize(self) -> Tensor:
        """The float32 weight [out, in].

        Raises:
            OptionError: the shapes do not belong together.
        """
        self.check_shapes()
        weight = torch.empty(self.shape, dtype=torch.float32, device=self.packed.device)
        rows = rows_of_block(self.in_features)
        for block, part in zip(weight.split(rows), self.parts(), strict=True):
            block.copy_(part)
        return weight

    def check_shapes(self) -> None:
        """Raise an `OptionError` unless the shapes of the tensors belong together."""
        out_features, in_features = self.shape
        grid = [out_features, group_count(in_features, self.group_size)]
        needed = [[out_features, packed_columns(in_features, self.bits)], grid, grid]
        tensors = (self.packed, self.scales, self.zero_points)
        if [list(tensor.shape) for tensor in tensors] != needed:
            raise OptionError(
                f"a weight of {self.bits} bits",
                found="packed, scales and zero_points of shapes "
                f"{[list(tensor.shape) for tensor in tensors]}",
                needed=f"shapes {needed}",
                remedy="Pass the group_size and in_features the weight was quantized with.",
            )

    def to_saved(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a file holds, from which the fields come back exactly.

        Returns:
            `(packed, scales, zero_points)`: uint8 [out, bytes], bfloat16 [out, groups] and
            float16 [out, groups]; the zero points of symmetric weights share one element in memory.
        """
        zero_points = self.zero_points.detach()
        if self.symmetric:
            one = zero_points.new_full((1, 1), self.integer.middle)
            zero_points = one.to(ZERO_POINT_DTYPE).expand(self.scales.shape)
        else:
            zero_points = zero_points.to(ZERO_POINT_DTYPE).contiguous()
        scales = self.scales.detach().to(SCALE_DTYPE)
        return self.packed.contiguous(), scales.contiguous(), zero_points
