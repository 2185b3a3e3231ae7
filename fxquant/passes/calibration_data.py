"""Calibration data in any of the forms people have it, as calls of the model."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fxquant.errors import CalibrationError

Call = tuple[tuple[Any, ...], dict[str, Any]]


def as_call(item: object, model: nn.Module | None = None) -> Call:
    """The `(args, kwargs)` of one item.

    Args:
        item: a tensor (one argument), a tuple or list (positional arguments) or a mapping
            (keyword arguments).
        model: with a model of one input, the target of an `(input, target)` pair is dropped.

    Raises:
        CalibrationError: the item is of another type.
    """
    if isinstance(item, Tensor):
        return (item,), {}
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, tuple | list):
        args = tuple(item)
        if model is not None and len(args) == 2 and _input_count(model) == 1:
            return (args[0],), {}
        return args, {}
    raise CalibrationError(
        "calibration data",
        found=f"an item of type {type(item).__name__}",
        needed="a tensor, a tuple or list of arguments, or a dict of keyword arguments",
        remedy="Let the data loader yield what the model is called with.",
    )


def calls(
    data: Iterable[object], model: nn.Module, num_samples: int | None = None
) -> Iterator[Call]:
    """The calls of `data`, at most `num_samples` rows of them; the last batch may be cut.

    Raises:
        CalibrationError: `data` is no iterable of items.
    """
    left = num_samples
    for item in _items(data):
        if left is not None and left <= 0:
            return
        call = as_call(item, model)
        rows = row_count(call)
        if left is not None and rows > left:
            call, rows = _cut(call, rows, left), left
        if left is not None:
            left -= rows
        yield call


def row_count(call: Call) -> int:
    """The size of the first dimension of the first tensor; a scalar counts as one."""
    for value in (*call[0], *call[1].values()):
        if isinstance(value, Tensor):
            return value.shape[0] if value.ndim else 1
    return 1


def describe(call: Call) -> str:
    """The shapes of a call's tensors, for messages."""
    named = [*enumerate(call[0]), *call[1].items()]
    return ", ".join(
        f"{name}: {list(v.shape) if isinstance(v, Tensor) else type(v).__name__}"
        for name, v in named
    )


def _items(data: Iterable[object]) -> Iterator[object]:
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise CalibrationError(
            "calibration data",
            found=f"a single {type(data).__name__}",
            needed="an iterable of batches, such as a list or a DataLoader",
            remedy="Put a single batch into a list: [batch].",
        )
    return iter(data)


def _cut(call: Call, rows: int, keep: int) -> Call:
    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
            return value[:keep]
        return value

    args, kwargs = call
    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


def _input_count(model: nn.Module) -> int:
    """How many arguments the model needs."""
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(p.default is p.empty for p in parameters)
