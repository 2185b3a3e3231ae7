"""Python loops over a size, marked while `torch.export` runs a forward.

`for t in range(x.shape[1])` and `for row in x` would make the size a constant: the loop runs as
often as in the example, and the exported graph is right for that size only. Here the loop runs as
often as in the example, but the size stays what it is, a number that may change. The rounds are
told apart by nodes `mark(count, loop, round)`, and a list of what the rounds made becomes one
tensor by `collect`, whose size is that number again. `rolling.py` makes one node of the rounds.
`len(x)`, too, gives the size as it is.

What a round does must not depend on its number in another way than as an index: a number that is
compared makes the loop one that cannot be rolled.
"""

import builtins
import operator
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.overrides import TorchFunctionMode

FEWEST_ROUNDS = 3  # from which what changes from round to round can be told
END = -1

_library = torch.library.Library("fxquant_tracing", "DEF")
_library.define("mark(SymInt count, int loop, int round) -> ()")
_library.define("collect(Tensor[] parts, SymInt count, int dim, bool is_new_dim) -> Tensor")
MARK = torch.ops.fxquant_tracing.mark.default
COLLECT = torch.ops.fxquant_tracing.collect.default
torch.fx.node.has_side_effect(MARK)


def _mark(count: int, loop: int, round: int) -> None:
    """A place in the graph: nothing is computed."""


def _collect(parts: list[Tensor], count: int, dim: int, is_new_dim: bool) -> Tensor:
    shape: list[Any] = list(parts[0].shape)
    if is_new_dim:
        shape.insert(dim % (len(shape) + 1), count)
    else:
        shape[dim % len(shape)] *= count
    return parts[0].new_empty(shape)


def _join(parts: list[Tensor], count: int, dim: int, is_new_dim: bool) -> Tensor:
    return torch.stack(parts, dim) if is_new_dim else torch.cat(parts, dim)


torch.library.register_fake("fxquant_tracing::mark", _mark)
torch.library.register_fake("fxquant_tracing::collect", _collect)
_library.impl("mark", _mark, "BackendSelect")  # on values, where an export knows them
_library.impl("collect", _join, "CompositeExplicitAutograd")


class ShortLoopError(Exception):
    """A loop over a size has too few rounds to tell what changes from round to round."""


class LoopMarks(TorchFunctionMode):
    """Marks the loops over sizes of a forward that is exported inside of it.

    Args:
        takes_short_loops: whether a loop that has too few rounds is left as it is; else one that
            gets more with larger sizes of the inputs raises a `ShortLoopError`.

    Attributes:
        count: how many loops were marked.
        fault: why they cannot be rolled, or None.
    """

    def __init__(self, *, takes_short_loops: bool = True) -> None:
        super().__init__()
        self.takes_short_loops = takes_short_loops
        self.count = 0
        self.fault: str | None = None
        self._small: set[Any] = set()  # symbols of sizes that are smaller than loops need
        self._current: tuple[int, int] | None = None  # the loop and round that run
        self._sizes: dict[int, Any] = {}  # of the loops that ended
        self._made: dict[int, tuple[int, int, Tensor]] = {}  # by identity: the round it is from
        self._iterated: tuple[int, int] | None = None

    @contextmanager
    def watching(self, inputs: Iterable[Any]) -> Iterator[None]:
        """Where `range` of a size that may change is a loop to mark.

        Args:
            inputs: of the forward that runs inside.
        """
        sizes = [size for x in inputs if isinstance(x, Tensor) for size in x.shape]
        small = (size for size in sizes if _may_change(size) and _hint(size) < FEWEST_ROUNDS)
        self._small = {symbol for size in small for symbol in _symbols(size)}
        kept, length = builtins.range, builtins.len
        builtins.range = self._range_class(kept)  # type: ignore[misc]
        builtins.len = _length_of(length)
        try:
            with self:
                yield
        finally:
            builtins.range = kept  # type: ignore[misc]
            builtins.len = length

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if func in _UNBIND:
            parts = self._parts(*args, **options)
            if parts is not None:
                return parts
        if func is Tensor.__len__ and _user_frame() == self._iterated:
            return _hint(args[0].shape[0])  # `list(x)` asks for a guess after it began to iterate
        if func in _JOIN:
            joined = self._joined(func, *args, **options)
            if joined is not None:
                return joined
        result = func(*args, **options)
        if self._current is not None:
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, Tensor):
                    self._made[id(tensor)] = (*self._current, tensor)
        return result

    def _range_class(self, kept: type[range]) -> Any:
        def make(cls: Any, *args: Any) -> Any:
            start, stop, step = {1: (0, *args, 1), 2: (*args, 1)}.get(len(args), args)
            if _may_change(step) and not _is_torch(sys._getframe(1)) and 0 < stop - start <= step:
                return iter([start])  # one part of the whole length
            is_known = all(isinstance(a, int) for a in (start, step))
            if not is_known or not _may_change(stop) or step <= 0 or _is_torch(sys._getframe(1)):
                return kept(*args)
            count = stop if (start, step) == (0, 1) else (stop - start + step - 1) // step
            return self._rounds(count, start, step)

        kind = type("_Kind", (type,), {"__instancecheck__": lambda _, v: isinstance(v, kept)})
        return kind("range", (), {"__new__": make})

    def _rounds(self, count: Any, start: int = 0, step: int = 1) -> Any:
        """The numbers of a loop's rounds."""
        often = _hint(count)
        if often < FEWEST_ROUNDS:
            self._meet_short_loop(count)
            return iter([start + step * i for i in _plain_range(int(count))])
        return self._marked(count, often, start, step)

    def _meet_short_loop(self, count: Any) -> None:
        # A number of chunks that is 1 for nine tokens stays 1 for a few more.
        if not self.takes_short_loops and self._small & _symbols(count):
            raise ShortLoopError

    def _marked(self, count: Any, often: int, start: int, step: int) -> Iterator[int]:
        if self._current is not None:
            self.fault = "a loop over a size inside another one"
        number, self.count = self.count, self.count + 1
        for i in _plain_range(often):
            MARK(count, number, i)
            self._current = (number, i)
            yield _Index(start + step * i, self)
        MARK(count, number, END)
        self._current = None
        self._sizes[number] = count

    def _parts(self, source: Any, dim: int = 0) -> Any:
        """The rows of a tensor along a dimension whose size may change, or None."""
        if not isinstance(source, Tensor) or not source.ndim:
            return None
        size = source.shape[dim]
        if not _may_change(size):
            return None
        if _hint(size) < FEWEST_ROUNDS:
            self._meet_short_loop(size)
            return None
        self._iterated = _user_frame()
        return _Parts(self, source, dim, size)

    def rows(self, source: Tensor, dim: int, size: Any) -> Iterator[Tensor]:
        """The rows, one for each round."""
        for index in self._marked(size, _hint(size), 0, 1):
            row = torch.select(source, dim, int(index))
            if self._current is not None:
                self._made[id(row)] = (*self._current, row)
            yield row

    def _joined(self, func: Any, tensors: Any, dim: Any = 0, **options: Any) -> Tensor | None:
        """`stack` or `cat` of what each round of a loop made, or None."""
        dim = options.pop("axis", dim)
        if options or not isinstance(tensors, list | tuple) or not isinstance(dim, int):
            return None
        found = [self._made.get(id(t), (None, None, t)) for t in tensors]
        loops = {number for number, _, _ in found}
        if len(loops) != 1 or [i for _, i, _ in found] != list(_plain_range(len(found))):
            return None
        count = self._sizes.get(loops.pop())  # type: ignore[arg-type]
        if count is None or _hint(count) != len(found):
            return None
        result: Tensor = COLLECT(list(tensors), count, dim, func in _STACK)
        return result


_plain_range = range
_STACK = (torch.stack,)
_JOIN = (torch.stack, torch.cat, torch.concat, torch.concatenate)
_UNBIND = (torch.unbind, Tensor.unbind)


class _Parts:
    """What `unbind` gives, as far as it is iterated, indexed or counted."""

    def __init__(self, marks: LoopMarks, source: Tensor, dim: int, size: Any) -> None:
        self.marks, self.source, self.dim, self.size = marks, source, dim, size

    def __iter__(self) -> Iterator[Tensor]:
        return self.marks.rows(self.source, self.dim, self.size)

    def __len__(self) -> int:
        return int(self.size)  # the size is a constant from here on

    def __getitem__(self, index: int) -> Tensor:
        return torch.select(self.source, self.dim, index)


class _Index(int):
    """The number of a round: an index, and what is computed of it, but nothing to compare."""

    marks: LoopMarks

    def __new__(cls, value: int, marks: LoopMarks) -> "_Index":
        made = super().__new__(cls, value)
        made.marks = marks
        return made

    __hash__ = int.__hash__


def _computes(name: str) -> Any:
    function = getattr(int, name)
    plain = getattr(operator, name.strip("_").removeprefix("r"))
    is_reflected = name.startswith("__r")

    def compute(self: _Index, *others: Any) -> Any:
        if any(isinstance(other, SymInt) for other in others):  # it does not know this class
            operands = (int(self), *others)
            return plain(*(reversed(operands) if is_reflected else operands))
        result = function(self, *others)
        return _Index(result, self.marks) if type(result) is int else result

    return compute


def _compares(name: str) -> Any:
    function = getattr(int, name)

    def compare(self: _Index, *others: Any) -> Any:
        self.marks.fault = "its rounds do not all do the same: it compares the round's number"
        return function(self, *others)

    return compare


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "neg", "pos"):
    setattr(_Index, f"__{_name}__", _computes(f"__{_name}__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "bool", "mod", "rmod", "floordiv", "rfloordiv",
              "divmod", "and", "or", "xor"):  # fmt: skip
    setattr(_Index, f"__{_name}__", _compares(f"__{_name}__"))


def _length_of(length: Any) -> Any:
    """`len` for a forward that is exported: of a tensor it is its first size.

    All of torch calls it while it runs, so what is no tensor is told first.
    """

    def length_of(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or not _is_open(value.shape[0]):
            return length(value)
        return length(value) if _is_torch(sys._getframe(1)) else value.shape[0]

    return length_of


def _may_change(size: Any) -> bool:
    """Whether it is a size of the inputs, or computed of one, that has a value in the example."""
    return _is_open(size) and size.node.has_hint()


def _is_open(size: Any) -> bool:
    """Whether it is a size that may be another one in another call, as that of `nonzero`."""
    return isinstance(size, SymInt) and size.node.maybe_as_int() is None


def _hint(size: Any) -> int:
    """The size in the example; nothing is assumed about it."""
    return int(size.node.hint) if isinstance(size, SymInt) else operator.index(size)


def _symbols(size: Any) -> set[Any]:
    """The sizes of inputs that it is computed of, as torch calls them."""
    return set(size.node.expr.free_symbols) if isinstance(size, SymInt) else set()


def _is_torch(frame: Any) -> bool:
    return str(frame.f_globals.get("__name__", "")).split(".")[0] in ("torch", "sympy", "fxquant")


def _user_frame() -> tuple[int, int] | None:
    """Where the user's code is: the innermost frame that is not torch's, and its instruction."""
    frame: Any = sys._getframe(1)
    while frame is not None and _is_torch(frame):
        frame = frame.f_back
    return None if frame is None else (id(frame), frame.f_lasti)
