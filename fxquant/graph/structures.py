"""Structured values in graphs: functions that graphs call, and walks over a model's output."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
import torch.fx
from torch import Tensor

from fxquant.errors import TraceError

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


class OutputDict(dict[str, Any]):
    """A model's named outputs: by key, by attribute, or by position.

    Stands in for classes such as Hugging Face's `ModelOutput`, which a saved graph must not need.

    >>> output = OutputDict(logits=1, loss=2)
    >>> output.logits, output["loss"], output[0], output.to_tuple()
    (1, 2, 1, (1, 2))
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no output named {name!r}; there are {sorted(self)}")

    def __getitem__(self, key: str | int | slice) -> Any:
        return dict.__getitem__(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in order."""
        return tuple(self.values())


@graph_function
def output_dict(**outputs: Any) -> OutputDict:
    """Build a model's named outputs."""
    return OutputDict(outputs)


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


torch.fx.node.has_side_effect(expect_constant)


def named_fields(value: object) -> dict[str, Any] | None:
    """The fields of a dict subclass, a dataclass or a named tuple; None for anything else."""
    if isinstance(value, Mapping) and type(value) is not dict:
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
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
