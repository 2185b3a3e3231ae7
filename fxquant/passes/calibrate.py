"""Calibrate: run data through the observers."""

import sys
from collections.abc import Iterable, Sized

import torch
from torch import nn
from tqdm import tqdm

from fxquant.errors import CalibrationError, check_positive_int
from fxquant.observers import Observer
from fxquant.passes.calibration_data import Call, calls, describe, row_count


def calibrate(
    observed: nn.Module,
    data: Iterable[object],
    *,
    num_samples: int | None = None,
    progress: bool | None = None,
) -> int:
    """Run `data` through a model with observers.

    Args:
        observed: what `insert_observers` returned.
        data: any iterable of items: a tensor (one argument), a tuple or list (positional
            arguments), a mapping (keyword arguments). `(input, target)` pairs work on a model of
            one input.
        num_samples: stop after so many rows of the first dimension.
        progress: show a progress bar; by default on a terminal only.

    Returns:
        How many rows were used.

    Raises:
        CalibrationError: the data is empty or of a wrong form, the model does not accept a batch,
            or an activation is NaN or Inf (the node is named).
    """
    if num_samples is not None:
        check_positive_int("num_samples", num_samples)
    name_observers(observed)
    used = 0
    for index, call in enumerate(_with_progress(data, observed, num_samples, progress)):
        run_call(observed, call, index)
        used += row_count(call)
    if not used:
        raise CalibrationError(
            "calibration data",
            found="no samples",
            needed="at least one batch",
            remedy="Pass representative inputs; a generator that was used up must be made anew.",
        )
    for module in observed.modules():
        if isinstance(module, Observer):
            module.check()
    return used


def run_call(model: nn.Module, call: Call, index: int) -> object:
    """Run one batch without gradients.

    Raises:
        CalibrationError: the model does not accept it.
    """
    args, kwargs = call
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except CalibrationError:
        raise
    except Exception as error:  # a model may raise anything at all
        raise CalibrationError(
            f"calibration batch {index}",
            found=f"that the model raises {type(error).__name__}: {error} on {describe(call)}",
            needed="a batch the model accepts",
            remedy="Yield the arguments of the model's forward, by position or by name.",
        ) from error


def name_observers(observed: nn.Module) -> None:
    """Let each observer's errors name its place."""
    for name, module in observed.named_modules():
        if isinstance(module, Observer):
            module.node_name = f"the value {name.removesuffix('_observer')!r}"


def _with_progress(
    data: Iterable[object], model: nn.Module, num_samples: int | None, progress: bool | None
) -> Iterable[Call]:
    is_shown = sys.stderr.isatty() if progress is None else progress
    total = len(data) if isinstance(data, Sized) and num_samples is None else None
    return tqdm(calls(data, model, num_samples), "calibrating", total, disable=not is_shown)
