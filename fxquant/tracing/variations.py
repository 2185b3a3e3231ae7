"""Other sizes of an example call: batches and lengths that a model may take too.

Nobody says which dimension of which input is the batch and which is a length, so it is tried.
Dimensions that have the same size may belong together: those at the same position first (the batch
of all inputs), then all of that size (a mask [T, T] beside inputs [B, T, C]), then first
dimensions that are multiples of it (4 rows of codes for each row of text).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.graph.calls import Call

Place = tuple[int, int]  # which tensor of the call, which dimension of it
MOST_AXES = 4
LENGTH_DIMS = 3  # of a tensor with more, the second dimension is no length
LONG = 32  # beyond it, comparing at sizes around it costs more than it tells
SHORT = 24
COMPARED_ROWS = 3  # of a batch that are enough to compare
LARGE = 1_000_000  # elements of a call of which a run costs too much to make it many times


@dataclass(frozen=True)
class Axis:
    """Dimensions of the inputs that change together.

    Attributes:
        places: which they are.
        size: what they are in the example, or what each is a multiple of.
        is_minor: whether it is neither a batch nor a length: the height or width of a picture, its
            channels, the pictures of a film.
    """

    places: frozenset[Place]
    size: int
    is_minor: bool = False

    @property
    def is_batch(self) -> bool:
        """Whether it is the first dimension of the first tensor."""
        return (0, 0) in self.places

    @property
    def is_long(self) -> bool:
        """Whether it is a length at which running the model costs more than it tells."""
        return self.size > LONG and not self.is_batch and not self.is_minor

    def resized(self, call: Call, size: int) -> Call:
        """The call with another size along the axis: elements are left out or repeated."""
        numbers = {id(t): i for i, t in enumerate(call.tensors())}

        def resize(tensor: Tensor) -> Tensor:
            number = numbers[id(tensor)]
            for dimension in range(tensor.ndim):
                if (number, dimension) in self.places:
                    length = tensor.shape[dimension]
                    wanted = size * max(1, length // self.size)  # 1: the call was cut along it
                    index = torch.arange(wanted, device=tensor.device) % length
                    tensor = tensor.index_select(dimension, index)
            return tensor

        return call.map(resize)

    def sizes(self, *, is_large: bool = False) -> list[int]:
        """Other sizes to try: the model may treat 1, less and more in another way.

        Args:
            is_large: whether the example is large: then no larger ones are tried.
        """
        n = self.size
        if n > LONG:  # the example itself was long
            wanted: tuple[int, ...] = (1, 7, SHORT)
        else:
            wanted = (1, 2, 3) if self.is_batch else (1, n // 2, n - 1, n + 1, 2 * n + 1)
        others = [s for s in dict.fromkeys(wanted) if s > 0 and s != n]
        smaller = [s for s in others if s < n]
        return smaller if is_large and smaller else others


def candidate_axes(call: Call) -> Iterator[list[Axis]]:
    """The axes of a call, each as alternatives: the first that a model accepts is meant."""
    shapes = [tuple(t.shape) for t in call.tensors()]
    seen: set[Place] = set()
    for number, shape in enumerate(shapes):
        for dimension, size in enumerate(shape):
            if (number, dimension) in seen or size == 0:
                continue
            aligned = frozenset(
                (i, dimension) for i, s in enumerate(shapes) if len(s) > dimension
                and s[dimension] == size
            )  # fmt: skip
            everywhere = frozenset(
                (i, d) for i, s in enumerate(shapes) for d, n in enumerate(s) if n == size
            )
            alone = frozenset([(number, dimension)])
            seen |= aligned
            multiples = frozenset(
                (i, 0) for i, s in enumerate(shapes) if s and s[0] and s[0] % size == 0
            )
            groups = dict.fromkeys((aligned, everywhere, alone))
            if dimension == 0 and size > 1:
                groups[multiples] = None
            yield [Axis(places, size, _is_minor(places, shapes)) for places in groups]


def _is_minor(places: frozenset[Place], shapes: list[tuple[int, ...]]) -> bool:
    """Of tokens [B, T] and features [B, T, C], T is a length; of [B, T, C, H, W] it is not."""
    return all(d > 1 or (d == 1 and len(shapes[number]) > LENGTH_DIMS) for number, d in places)


def free_axes(call: Call, accepts: Callable[[Call], bool]) -> list[Axis]:
    """The axes along which a model takes other sizes, as far as a few trials show.

    Trials are short where the model takes that: whether it takes other batches shows there too.
    """
    found: list[Axis] = []
    candidates = list(candidate_axes(call))
    short = _shortened(call, [alternatives[0] for alternatives in candidates], accepts)
    for alternatives in candidates:
        for axis in alternatives:
            example = call if axis.is_long else short
            trials = _trials(axis, is_large=is_large(call))
            if any(accepts(axis.resized(example, size)) for size in trials):
                found.append(axis)
                break
        if len(found) == MOST_AXES:
            break
    return found


def _shortened(call: Call, axes: list[Axis], accepts: Callable[[Call], bool]) -> Call:
    """The call with all its lengths cut, a large one to one row, where the model takes that."""
    short = call
    for axis in axes:
        if axis.is_long:
            short = axis.resized(short, SHORT)
        elif axis.is_batch and is_large(call):
            short = axis.resized(short, 1)
    return short if short is not call and accepts(short) else call


def is_large(call: Call) -> bool:
    """Whether a run of a model on the call, such as a film, may take seconds."""
    return sum(tensor.numel() for tensor in call.tensors()) > LARGE


def _trials(axis: Axis, *, is_large: bool) -> list[int]:
    """Sizes of which a model that takes others than the example's takes one."""
    near = axis.size - 1 if axis.size > 2 else axis.size + 1
    if axis.is_batch and is_large and axis.size > 1:
        return [1]
    if axis.is_batch:
        return [size for size in (near, 2 * axis.size) if size != axis.size]
    return [SHORT, near] if axis.is_long else [near]
