"""What the data say about a layer: moments of its input, and of how far its output must move.

Several layers may read one input (the projections to queries, keys and values): `InputMoments` are
collected once for all of them, and what is factored of them is factored once.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxquant.errors import CalibrationError

MOST_HELD = 4096  # tokens of a layer that are kept to compare results on
BLOCK_COLUMNS = 256  # columns of a symmetric product that are computed at once
COMPARED = 1 << 23  # elements of an output that are compared at once

T = TypeVar("T")


class InputMoments:
    """Sums over tokens of the input x of layers, and of what it lacks of the float model's input.

    All sums of products are kept for two halves of the tokens, so that what is learnt from one half
    can be tried on the other. Tokens that are held out are kept apart: they choose nothing, and
    tell which of several results is best.

    Args:
        channels: the width of x.
        readers: how many layers it is collected for; what is computed of it is kept for all.

    Attributes:
        tokens: how many tokens were added.
        total: Σ x, float64 [in].
        lacks: Σ (x_float − x) xᵀ, float32 [2, in, in] by half; None where nothing was lacking.
        total_lack: Σ (x_float − x), float64 [in].
        held: the tokens that were held out, at most `MOST_HELD`: x and x_float − x (or None), each
            [tokens, in], by batch.
    """

    def __init__(self, channels: int, *, readers: int = 1) -> None:
        self.tokens = 0
        self.total, self.total_lack = torch.zeros(2, channels, dtype=torch.float64)
        self.lacks: Tensor | None = None
        self.held: list[tuple[Tensor, Tensor | None]] = []
        self._upper = torch.zeros(2, channels, channels, dtype=torch.float32)
        self._is_mirrored, self._readers = True, readers
        self._made: dict[Hashable, Any] = {}

    def add(self, x: Tensor, lack: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            x: float32 [tokens, in].
            lack: x_float − x, [tokens, in]; None stands for zeros.
        """
        self.tokens += len(x)
        self.total += x.sum(0)  # of one batch in float32, which is several times faster
        self._made.clear()
        self._is_mirrored = False
        for half, part in enumerate(halves(x)):
            for start in range(0, x.shape[1], BLOCK_COLUMNS):  # below the diagonal it is the same
                rows = self._upper[half, start : start + BLOCK_COLUMNS, start:]
                rows.addmm_(part[:, start : start + BLOCK_COLUMNS].T, part[:, start:])
        if lack is not None:
            if self.lacks is None:
                self.lacks = torch.zeros_like(self._upper)
            self.total_lack += lack.sum(0)
            add_products(self.lacks, lack, x)

    def merge(self, other: "InputMoments") -> None:
        """Add the sums of other tokens, and what was held out of them; `other` is used up."""
        self._made.clear()
        if not self.tokens:  # its memory is taken over
            self._upper, self.lacks = other._upper, other.lacks
        else:
            self._upper += other._upper
            self.lacks = _sum_of(self.lacks, other.lacks)
        self._is_mirrored = False
        self.tokens += other.tokens
        self.total += other.total
        self.total_lack += other.total_lack
        self.held += other.held

    @property
    def hessians(self) -> Tensor:
        """Σ x xᵀ, float32 [2, in, in], by half."""
        if not self._is_mirrored:
            for matrix in self._upper:
                matrix.triu_()
                matrix += matrix.triu(1).T
            self._is_mirrored = True
        return self._upper

    @property
    def hessian(self) -> Tensor:
        """Σ x xᵀ over all tokens, [in, in]."""
        return self.hessians.sum(0)

    @property
    def importance(self) -> Tensor:
        """The mean square of each input, [in]."""
        return self._upper.diagonal(dim1=1, dim2=2).sum(0) / max(self.tokens, 1)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` computes of these moments; computed once for all layers that read them."""
        if self._readers == 1:
            return make()
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def hold_out(self, x: Tensor, lack: Tensor | None = None) -> int:
        """Keep tokens that choices are measured on; how many were kept."""
        if x.shape[1] != len(self.total):
            raise CalibrationError(
                "a calibration batch",
                found=f"that a layer reads {x.shape[1]} values a token",
                needed=f"the {len(self.total)} that its weight takes",
                remedy="Yield batches that the model runs on.",
            )
        room = MOST_HELD - sum(len(kept) for kept, _ in self.held)
        if len(x) and room > 0:
            own = None if lack is None else lack[:room].clone()
            self.held.append((x[:room].clone(), own))
        return max(min(len(x), room), 0)


class LayerMoments:
    """Moments of a layer's input x, and of the shift that its output lacks.

    The shift of a token is what has to be added to the float layer's output on the quantized
    model's input x to get what the float model has there: W (x_float − x), and the error of a
    residual that is added behind the layer.

    Args:
        in_features: the width of x.
        out_features: the width of the layer's output.
        shared: of x, where several layers read it.
        weight: W [out, in]; needed where `shared` knows what x lacks.

    Attributes:
        input: the moments of x.
        held_tokens: how many tokens were held out; those after the first `MOST_HELD` are dropped.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        shared: InputMoments | None = None,
        weight: Tensor | None = None,
    ) -> None:
        self.input = InputMoments(in_features) if shared is None else shared
        self.in_features, self.out_features = in_features, out_features
        self._weight = None if weight is None else weight.detach()
        self._cross: Tensor | None = None
        self._total_shift = torch.zeros(out_features, dtype=torch.float64)
        self._held_shifts: list[Tensor | None] = []

    @staticmethod
    def bytes_of(in_features: int, out_features: int) -> int:
        """Bytes of the sums of a layer, at most."""
        return 2 * torch.float32.itemsize * in_features * (in_features + out_features)

    def add(self, x: Tensor, shift: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: [..., in], what the layer sees in the quantized model.
            shift: [..., out]; None stands for zeros.
            mask: boolean [...], False for tokens that do not count (padding).
        """
        x = tokens_of(x, mask)
        self.input.add(x)
        self.add_shift(x, None if shift is None else tokens_of(shift, mask))

    def add_shift(self, x: Tensor, shift: Tensor | None) -> None:
        """Add the shift [tokens, out] of tokens x [tokens, in] that `input` has been given."""
        if shift is None:
            return
        if self._cross is None:
            size = 2, self.out_features, self.in_features
            self._cross = torch.zeros(size, dtype=torch.float32)
        self._total_shift += shift.sum(0)
        add_products(self._cross, shift, x)

    def hold_out(self, x: Tensor, shift: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add a batch that choices are measured on; the arguments are those of `add`."""
        count = self.input.hold_out(tokens_of(x, mask))
        self.hold_out_shift(None if shift is None else tokens_of(shift, mask), count)

    def hold_out_shift(self, shift: Tensor | None, count: int) -> None:
        """Keep the shift [tokens, out] of the first `count` tokens, which `input` has kept."""
        if count:
            self._held_shifts.append(None if shift is None else shift[:count].clone())

    def merge(self, other: "LayerMoments") -> None:
        """Add the shifts of other tokens, but not `input`, which layers may share.

        See `merge_all`; `other` is used up.
        """
        self._cross = _sum_of(self._cross, other._cross)
        self._total_shift += other._total_shift
        self._held_shifts += other._held_shifts

    def held_errors(
        self, weight: Tensor, candidates: Sequence[tuple[Tensor, Tensor]], outputs: int = MOST_HELD
    ) -> list[float]:
        """How far quantized layers are from their aim, Σ |(Q − W) x + b − shift|².

        The sum is over tokens that were held out, and about `outputs` of the outputs: two layers
        are told apart by a sample of them as well as by all.

        Args:
            weight: the float weight W [out, in].
            candidates: of each layer Q, dequantized [out, in], and b, what is added to the float
                layer's bias, [out].
            outputs: that are compared; where there are up to twice as many, all are.
        """
        totals = [0.0] * len(candidates)
        chosen = slice(None, None, max(1, len(weight) // outputs))
        base = weight[chosen].detach().float()
        changes = [(q[chosen].float() - base, offset[chosen].float()) for q, offset in candidates]
        shifts = self._held_shifts or [None] * len(self.input.held)
        for (x, lack), shift in zip(self.input.held, shifts, strict=True):
            size = max(1, COMPARED // len(x))
            own = None if shift is None else shift[:, chosen]
            for rows in (slice(start, start + size) for start in range(0, len(base), size)):
                aim = None if own is None else own[:, rows]
                if lack is not None:
                    explained = lack @ base[rows].T
                    aim = explained if aim is None else explained.add_(aim)
                for number, (change, offset) in enumerate(changes):
                    error = torch.addmm(offset[rows], x, change[rows].T)
                    if aim is not None:
                        error -= aim
                    totals[number] += float(error.double().square().sum())
        return totals

    @property
    def tokens(self) -> int:
        """How many tokens were added."""
        return self.input.tokens

    @property
    def held_tokens(self) -> int:
        """How many tokens are held out."""
        return sum(len(x) for x, _ in self.input.held)

    @property
    def hessians(self) -> Tensor:
        """Σ x xᵀ, float32 [2, in, in], by half."""
        return self.input.hessians

    @property
    def hessian(self) -> Tensor:
        """Σ x xᵀ over all tokens, [in, in]."""
        return self.input.hessian

    @property
    def importance(self) -> Tensor:
        """The mean square of each input, [in]."""
        return self.input.importance

    @property
    def total(self) -> Tensor:
        """Σ x, float64 [in]."""
        return self.input.total

    @property
    def has_shift(self) -> bool:
        """Whether the output lacks anything."""
        return any(t is not None and bool(t.any()) for t in (self._cross, self.input.lacks))

    @property
    def cross(self) -> Tensor:
        """Σ shift xᵀ, float32 [2, out, in], by half."""
        return self.cross_of(slice(None))

    def cross_of(self, rows: slice) -> Tensor:
        """The same of some outputs."""
        found = None if self._cross is None else self._cross[:, rows]
        if self.input.lacks is None or self._weight is None:
            size = len(range(*rows.indices(self.out_features)))
            return torch.zeros(2, size, self.in_features) if found is None else found
        explained = self._weight[rows].float() @ self.input.lacks
        return explained if found is None else explained + found

    @property
    def total_shift(self) -> Tensor:
        """Σ shift, float64 [out]."""
        if self._weight is None or self.input.lacks is None:
            return self._total_shift
        return self._total_shift + self._weight.double() @ self.input.total_lack


def merge_all(moments: Iterable[LayerMoments], others: Iterable[LayerMoments]) -> None:
    """Add the moments of other tokens of the same layers; `others` are used up.

    What was held out is expected in one of the two only.

    Args:
        moments: of layers; added to.
        others: of the same layers in the same order, sharing inputs in the same way.
    """
    done: set[int] = set()
    for own, other in zip(moments, others, strict=True):
        own.merge(other)
        if id(own.input) not in done:
            done.add(id(own.input))
            own.input.merge(other.input)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """`hessian` [in, in] with `damping` times its mean diagonal added to the diagonal.

    Inputs that are always zero get the mean besides: they are on their own, and no error spreads
    from them. Where all inputs are zero, the result is a multiple of the identity.
    """
    result = hessian.clone()
    diagonal = result.diagonal()
    mean = diagonal.mean()
    mean = torch.where(mean > torch.finfo(torch.float32).tiny, mean, 1.0)
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    return result


def tokens_of(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The tokens of `x` [..., channels] that count, float32 [tokens, channels]."""
    x = x if mask is None else x[mask]
    return x.reshape(-1, x.shape[-1]).float()


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second half of the tokens."""
    middle = len(x) // 2
    return x[:middle], x[middle:]


def _sum_of(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum, in the memory of `one` if it is there; None stands for zeros."""
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


def add_products(sums: Tensor, one: Tensor, other: Tensor) -> None:
    """Add Σ one otherᵀ to `sums` [2, one's width, other's width], by half of the tokens."""
    for total, a, b in zip(sums, halves(one), halves(other), strict=True):
        total.addmm_(a.T, b)
