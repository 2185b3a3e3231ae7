"""Calibrate: run data through the observers."""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager

import torch
from torch import nn

from fxquant.errors import CalibrationError, check_positive_int, check_type
from fxquant.graph.calls import Call
from fxquant.graph.left_alone import graph_left_alone, process_left_alone
from fxquant.observers import Observer
from fxquant.passes.calibration_data import calls, describe_inputs
from fxquant.report.progress import steps


def calibrate(
    observed: nn.Module,
    data: Iterable[object],
    *,
    num_samples: int | None = None,
    progress: bool | None = None,
) -> int:
    """Run `data` through a model with observers.

    The model runs in evaluation mode and without gradients; afterwards its modules are in the mode
    they were in. Calibrating again adds to what the observers saw.

    Args:
        observed: what `insert_observers` returned, or any module that holds observers.
        data: any iterable of items: a tensor (one argument), a tuple or list (positional
            arguments), a mapping (keyword arguments). `(input, target)` pairs work on a model of
            one input.
        num_samples: stop after so many rows of the first dimension; the last batch is cut there.
        progress: show a progress bar; by default on a terminal only.

    Returns:
        How many rows were used.

    Raises:
        CalibrationError: the data is empty or of a wrong form, the model does not accept a batch,
            or an activation is NaN or Inf (the node is named). An observer that no batch reached
            raises when its result is asked for.
    """
    if num_samples is not None:
        check_positive_int("num_samples", num_samples)
    check_type("observed", observed, nn.Module, "Pass what insert_observers returned.")
    name_observers(observed)
    observers = [m for m in observed.modules() if isinstance(m, Observer)]
    used = 0
    with process_left_alone(), _evaluating(observed):
        for index, call in enumerate(_with_progress(data, observed, num_samples, progress)):
            for observer in observers:
                observer.batch = index
            run_call(observed, call, index)
            used += call.row_count
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
    """Run one batch without gradients, on a clone: a forward may write into its inputs.

    Raises:
        CalibrationError: the model does not accept it.
    """
    with naming_batch(model, lambda: call, index):
        torch.manual_seed(index)  # a model that draws random numbers draws the same in each pass
        with graph_left_alone(model):
            return call.run(model)


@contextmanager
def naming_batch(
    model: nn.Module, call: Callable[[], Call], index: int | None = None
) -> Iterator[None]:
    """Whatever `model` raises on a batch becomes an error that names it.

    Args:
        model: what runs inside.
        call: gives the batch.
        index: its number, where that is known.

    Raises:
        CalibrationError: instead of what is raised inside.
    """
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:  # a model may raise anything at all
        raise CalibrationError(
            "a calibration batch" if index is None else f"calibration batch {index}",
            found=f"that the model raises {type(error).__name__}: {error} on {call().describe()}",
            needed=f"a batch that {describe_inputs(model)} accepts",
            remedy="Yield the arguments of the model's forward, by position or by name.",
        ) from error


def accepts(gm: nn.Module, call: Call) -> bool:
    """Whether the graph runs on a call; what cannot be cut into rows it refuses."""
    try:
        with graph_left_alone(gm):
            call.run(gm)
    except Exception:  # whatever a model raises
        return False
    return True


def name_observers(observed: nn.Module) -> None:
    """Let each observer's errors name its place, unless it has a name of its own."""
    for name, module in observed.named_modules():
        if isinstance(module, Observer) and module.node_name == type(module).__name__:
            module.node_name = f"the value {name.removesuffix('_observer')!r}"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, set on the modules themselves: exported ones refuse `eval()`."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _with_progress(
    data: Iterable[object], model: nn.Module, num_samples: int | None, progress: bool | None
) -> Iterable[Call]:
    total = _length(data) if num_samples is None else None
    return steps(calls(data, model, num_samples), "calibrating", total=total, progress=progress)


def _length(data: Iterable[object]) -> int | None:
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a DataLoader of an iterable dataset
        return None
