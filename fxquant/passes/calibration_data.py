"""Calibration data in any of the forms people have it, as calls of the model."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.errors import CalibrationError

Call = tuple[tuple[Any, ...], dict[str, Any]]
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def as_call(item: object, model: nn.Module | None = None) -> Call:
    """The `(args, kwargs)` of one item.

    Args:
        item: a tensor (one argument), a tuple or list (positional arguments) or a mapping
            (keyword arguments).
        model: with a model of one input, the target of an `(input, target)` pair is dropped. A
            parameter whose default is a number, text or flag is no input.

    Raises:
        CalibrationError: the item is of another type, or has a key that `model` does not take.
    """
    if isinstance(item, Tensor):
        return (item,), {}
    if isinstance(item, Mapping):
        kwargs = dict(item)
        if model is not None:
            _check_names(kwargs, model)
        return (), kwargs
    if isinstance(item, tuple | list):
        is_pair = len(item) == 2 and model is not None and _has_one_input(model)
        return (tuple(item[:1]) if is_pair else tuple(item)), {}
    raise CalibrationError(
        "calibration data",
        found=f"an item of type {type(item).__name__}",
        needed="a tensor, a tuple or list of arguments, or a dict of keyword arguments",
        remedy="Let the data loader yield what the model is called with.",
    )


def calls(
    data: Iterable[object], model: nn.Module, num_samples: int | None = None
) -> Iterator[Call]:
    """The calls of `data`, at most `num_samples` rows of them.

    The last batch may be cut, and nothing is drawn from `data` after it.

    Raises:
        CalibrationError: `data` is no iterable of items, or an item is not a call of `model`.
    """
    left = num_samples
    for item in _items(data):
        call = as_call(item, model)
        if left is None:
            yield call
            continue
        rows = row_count(call)
        yield call if rows <= left else _cut(call, rows, left)
        left -= rows
        if left <= 0:
            return


def row_count(call: Call) -> int:
    """The size of the first dimension of the first tensor; a scalar counts as one."""
    tensors = (value for value in pytree.tree_leaves(call) if isinstance(value, Tensor))
    first = next(tensors, None)
    return first.shape[0] if first is not None and first.ndim else 1


def describe(call: Call) -> str:
    """The shapes of a call's tensors, for messages."""
    named = [*enumerate(call[0]), *call[1].items()]
    return ", ".join(f"{name}: {_shapes(value)}" for name, value in named)


def describe_inputs(model: nn.Module) -> str:
    """The model's signature without annotations, for messages."""
    plain = [p.replace(annotation=p.empty) for p in _parameters(model)]
    return f"forward{inspect.Signature(plain)}"


def _shapes(value: object) -> object:
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, tuple | list):
        return f"({', '.join(str(_shapes(v)) for v in value)})"
    return type(value).__name__


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
    """The first `keep` rows of each tensor that has as many as the batch."""

    def cut(value: Any) -> Any:
        has_rows = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows
        return value[:keep] if has_rows else value

    args, kwargs = call
    return pytree.tree_map(cut, args), pytree.tree_map(cut, kwargs)


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _has_one_input(model: nn.Module) -> bool:
    parameters = _parameters(model)
    inputs = [p for p in parameters if p.kind in POSITIONAL and _is_input(p)]
    return len(inputs) == 1 and all(p.kind is not p.VAR_POSITIONAL for p in parameters)


def _is_input(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty or parameter.default is None


def _check_names(kwargs: Mapping[str, Any], model: nn.Module) -> None:
    parameters = _parameters(model)
    accepted = [p.name for p in parameters if p.kind in NAMED]
    surplus = [name for name in kwargs if name not in accepted]
    if surplus and all(p.kind is not p.VAR_KEYWORD for p in parameters):
        raise CalibrationError(
            "calibration data",
            found=f"a batch with the keys {surplus}, which the model does not take",
            needed=f"keys among {accepted}",
            remedy="Leave the others out of the batches; labels are not needed to calibrate.",
        )
