"""Structured values in graphs: functions that graphs call, and walks over a model's output."""

import dataclasses
import functools
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
import torch.fx
from torch import Tensor

from fxquant.errors import ShapeError, TraceError

P = ParamSpec("P")
R = TypeVar("R")


def graph_function(function: Callable[P, R]) -> Callable[P, R]:
    """Make `function` one node of a graph: called with proxies it is recorded, not entered."""

    @functools.wraps(function)
    def record_or_call(*args: P.args, **kwargs: P.kwargs) -> R:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.fx.Proxy):
                node = value.tracer.create_proxy("call_function", record_or_call, args, kwargs)
                return node  # type: ignore[return-value]
        return function(*args, **kwargs)

    return record_or_call


DTYPE_LIMITS = ("min", "max", "eps", "tiny", "smallest_normal")


class OutputDict(dict[str, Any]):
    """A model's named outputs: by key, by attribute, or by position.

    Stands in for classes such as Hugging Face's `ModelOutput`, which a saved graph must not need.
    As there, outputs that are None are no keys, but attributes that can be asked for.

    >>> output = OutputDict(logits=1, loss=2)
    >>> output.logits, output["loss"], output[0], output.to_tuple()
    (1, 2, 1, (1, 2))
    """

    absent: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in self.absent:
            return None
        raise AttributeError(f"no output named {name!r}; there are {sorted(self)}")

    def __getitem__(self, key: str | int | slice) -> Any:
        return dict.__getitem__(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in order."""
        return tuple(self.values())


@graph_function
def output_dict(**outputs: Any) -> OutputDict:
    """Build a model's named outputs; those that are None become `absent`."""
    made = OutputDict({name: value for name, value in outputs.items() if value is not None})
    made.absent = tuple(name for name, value in outputs.items() if value is None)
    return made


@graph_function
def named_tuple(class_name: str, fields: tuple[str, ...], *values: Any) -> Any:
    """Build a named tuple, in place of a class that a saved graph must not need."""
    return _tuple_class(class_name, tuple(fields))(*values)


@functools.cache
def _tuple_class(class_name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(class_name, fields, rename=True)


@graph_function
def dtype_limit(dtype: torch.dtype, name: str) -> float | int:
    """A limit of a dtype, one of `DTYPE_LIMITS`; integers have "min" and "max" only.

    It stands for an attribute of `torch.finfo(dtype)` or `torch.iinfo(dtype)`.
    """
    if name not in DTYPE_LIMITS:
        raise TraceError(
            f"limit {name!r} of {dtype}",
            found="a name that is no limit",
            needed=", ".join(DTYPE_LIMITS),
            remedy="Trace the model again.",
        )
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    found: float | int = getattr(limits, name)
    return found


@graph_function
def expect_constant(value: object, traced: object, name: str) -> None:
    """Raise a `TraceError` unless argument `name` still has the value the graph was traced with."""
    if value != traced:
        raise TraceError(
            f"argument {name!r}",
            found=repr(value),
            needed=f"{traced!r}, the value the graph was traced with",
            remedy="Trace the model again with this value in the example inputs.",
        )


@graph_function
def expect_shape(holds: object, text: str, *sizes: object) -> None:
    """Raise a `ShapeError` where the graph was not traced for the sizes of its inputs.

    Args:
        holds: whether it was.
        text: the condition in words; each `{}` in it stands for one of `sizes`.
        sizes: of the inputs.
    """
    if not holds:
        found, _, needed = text.partition("|")
        raise ShapeError(
            _filled(found, sizes),
            found="an input for which this graph was not traced",
            needed=needed,
            remedy="Pass other inputs, or trace again with an example of this size.",
        )


@graph_function
def expect_values(holds: object, where: str, code: str) -> None:
    """Raise a `TraceError` where the model would branch in another way than for its example.

    Args:
        holds: whether it takes the same way.
        where: the place in the model's code.
        code: the line there.
    """
    if not holds:
        raise TraceError(
            where,
            found="values for which this graph was not traced",
            needed=f"inputs for which `{code}` goes the way it went for the example",
            remedy="Pass other inputs, or trace again with an example of this kind.",
        )


@graph_function
def seed_random(number: int) -> None:
    """Seed the random numbers of the process, as the model does before it draws some.

    Args:
        number: the seed.
    """
    torch.manual_seed(number)


def _filled(text: str, values: tuple[object, ...]) -> str:
    """`text` with its `{}` filled in; `str.format` could read any attribute of a value."""
    first, *parts = text.split("{}")
    shown = [*map(str, values), *["?"] * len(parts)]
    return first + "".join(value + part for value, part in zip(shown, parts, strict=False))


@graph_function
def named_result(value: Any, name: str) -> Any:
    """The output called `name` of a module: a field of a named tuple, or a key of a mapping.

    It stands for `getattr` in a saved graph, and reads nothing else.
    """
    if isinstance(value, Mapping) and name in value:
        return value[name]
    if isinstance(value, OutputDict) and name in value.absent:
        return None
    if is_named_tuple(value) and name in value._fields:
        return getattr(value, name)
    if dataclasses.is_dataclass(value) and name in {f.name for f in dataclasses.fields(value)}:
        return getattr(value, name)
    raise TraceError(
        f"output {name!r}",
        found=f"a {type(value).__name__} without it",
        needed="an output of that name",
        remedy="Trace the model again.",
    )


for _function in (expect_constant, expect_shape, expect_values):
    torch.fx.node.has_side_effect(_function)


def is_named_tuple(value: object) -> bool:
    """Whether `value` is a named tuple."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def named_fields(value: object) -> dict[str, Any] | None:
    """The fields of a dict subclass or a dataclass; None for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping) and type(value) is not dict:
        return dict(value)
    return None


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, dicts, dataclasses and model outputs, in order."""
    if isinstance(value, Tensor):
        yield value
        return
    fields = named_fields(value)
    children: Any = ()
    if fields is not None:
        children = fields.values()
    elif isinstance(value, Mapping):
        children = value.values()
    elif isinstance(value, list | tuple):
        children = value
    for child in children:
        yield from tensors_in(child)


def main_output(value: object) -> Tensor:
    """The first floating tensor of a model's output.

    Raises:
        TraceError: there is none.
    """
    for tensor in tensors_in(value):
        if tensor.is_floating_point():
            return tensor
    raise TraceError(
        "model output",
        found=f"{type(value).__name__} without a floating tensor",
        needed="a floating tensor to compare",
        remedy="Let the model return logits, embeddings or another floating tensor.",
    )
