"""Calibration data in any of the forms people have it, as calls of a model."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fxquant.errors import CalibrationError
from fxquant.graph.calls import Call
from fxquant.passes.padding import padding_mask

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# What calibration uses by default: so many rows, and of short texts more, until there are so many
# tokens. `docs/accuracy.md` has the measurement.
DEFAULT_ROWS = 150
DEFAULT_TOKENS = 30_000
ID_DTYPES = (torch.int32, torch.int64)


def as_call(item: object, model: nn.Module | None = None) -> Call:
    """The call that one item stands for.

    Args:
        item: a tensor (one argument), a tuple or list (positional arguments) or a mapping
            (keyword arguments).
        model: with a model of one input, the target of an `(input, target)` pair is dropped. A
            parameter whose default is a number, text or flag is no input.

    Raises:
        CalibrationError: the item is of another type, or has a key that `model` does not take.
    """
    if isinstance(item, Tensor | Call):
        return Call.of(item)
    if isinstance(item, Mapping):
        if model is not None:
            _check_names(item, model)
        return Call.of(item)
    if isinstance(item, tuple | list):
        is_pair = len(item) == 2 and model is not None and _has_one_input(model)
        call = Call.of(item[:1] if is_pair else item)
        return call if model is None else replace(call, padding=_positional_mask(call, model))
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
        CalibrationError: `data` is no iterable of items, or an item is not a call of `model` on
            dense tensors.
    """
    left = num_samples
    for index, item in enumerate(_items(data)):
        call = as_call(item, model)
        call.check_dense(f"calibration batch {index}", CalibrationError)
        if left is None:
            yield call
            continue
        yield call.rows(0, min(call.row_count, left))
        left -= call.row_count
        if left <= 0:
            return


def drawn_calls(
    data: Iterable[object], model: nn.Module, num_samples: int | None = None
) -> list[Call]:
    """The calls that calibration uses.

    Args:
        data: as for `calls`, like `model`.
        model: that is called.
        num_samples: rows, at most. None stands for 150 rows, and for rows of ids of tokens for as
            many as have 30,000 tokens, if these are more.

    Raises:
        CalibrationError: as `calls`.
    """
    if num_samples is not None:
        return list(calls(data, model, num_samples))
    found, rows, tokens = list[Call](), 0, 0
    for call in calls(data, model):
        count, missing = call.row_count, max(DEFAULT_ROWS - rows, 0)
        own = _token_count(call)
        if own:
            missing = max(missing, ceil((DEFAULT_TOKENS - tokens) * count / own))
        found.append(call.rows(0, min(count, missing)))
        if missing <= count:
            break
        rows, tokens = rows + count, tokens + own
    return found


def _token_count(call: Call) -> int:
    """How many ids of tokens [rows, tokens] a call has, without padding, one a row at least."""
    ids = [
        value.numel()
        for _, value in call.leaves()
        if isinstance(value, Tensor) and value.ndim == 2 and value.dtype in ID_DTYPES
    ]
    if not ids:
        return 0
    mask = padding_mask(call)
    return max(call.row_count, max(ids) if mask is None else int(mask.sum()))


def describe_inputs(model: nn.Module) -> str:
    """The model's signature without annotations, for messages."""
    plain = [p.replace(annotation=p.empty) for p in _parameters(model)]
    return f"forward{inspect.Signature(plain)}"


def _items(data: Iterable[object]) -> Iterator[object]:
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise CalibrationError(
            "calibration data",
            found=f"a single {type(data).__name__}",
            needed="an iterable of batches, such as a list or a DataLoader",
            remedy="Put a Dataset into a DataLoader."
            if isinstance(data, Dataset)
            else "Put a single batch into a list: [batch].",
        )
    return iter(data)


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _positional_mask(call: Call, model: nn.Module) -> Tensor | None:
    """What says which tokens are padding, where it is given by its position."""
    names = [p.name for p in _parameters(model) if p.kind in POSITIONAL]
    named = dict(zip(names, call.args, strict=False))
    return padding_mask(Call((), named))


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


def check_batches(batches: Sequence[Call]) -> None:
    """Refuse data that can measure nothing.

    Raises:
        CalibrationError: there are no rows, or a value is NaN; the batch is named.
    """
    if not sum(call.row_count for call in batches):
        raise CalibrationError(
            "calibration data",
            found="no samples",
            needed="at least one batch with a row",
            remedy="Pass representative inputs; a generator that was used up must be made anew.",
        )
    for index, call in enumerate(batches):
        for path, value in call.leaves():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if torch.isnan(value).any():
                raise CalibrationError(
                    f"calibration batch {index}, argument {path}",
                    found="NaN",
                    needed="numbers",
                    remedy="Remove or repair the samples with missing values.",
                )
