"""Every error that fxquant raises on purpose.

    FxquantError
    ├── OptionError        an argument is outside what is possible (also a ValueError)
    ├── WeightError        a weight cannot be quantized: NaN, Inf, a wrong shape
    ├── TraceError         the arguments given do not run the model
    │   └── ShapeError     an input has a size for which the graph was not traced
    ├── CalibrationError   calibration data is empty, has a wrong form or is not finite
    ├── RuleError          a rule the caller wrote matches nothing
    ├── BudgetError        no allocation of bits fits the budget
    ├── AccuracyError      the quantized model is less accurate than what was asked
    ├── SaveError          a model cannot be written
    ├── LoadError          a file is not a model that can be loaded
    ├── RunError           a node of a loaded graph failed (also a RuntimeError)
    └── ProcessGroupError  another process of a shared run failed, or is gone (also a RuntimeError)

Each text says where, what is there or happened, what is expected and what to do.
"""

import difflib
import math
import os
import sys
from collections.abc import Iterable


class FxquantError(Exception):
    """The base of all errors; its text is put together from four parts.

    Args:
        where: the node, argument or file concerned.
        found: what is there; or, after "that", what happened.
        needed: what is expected instead.
        remedy: what the caller can do.

    >>> print(FxquantError("bits", found="5", needed="4 or 8", remedy="Choose one of them."))
    bits: got 5. Expected 4 or 8. Choose one of them.
    >>> print(FxquantError("x.py:f", found="that it raised", needed="a model", remedy="Mend it."))
    x.py:f: it raised. Expected a model. Mend it.
    """

    def __init__(self, where: str, *, found: str, needed: str, remedy: str) -> None:
        self.where, self.found, self.needed, self.remedy = where, found, needed, remedy
        problem = found.removeprefix("that ") if found.startswith("that ") else f"got {found}"
        super().__init__(f"{where}: {problem.removesuffix('.')}. Expected {needed}. {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        parts = {"found": self.found, "needed": self.needed, "remedy": self.remedy}
        return _rebuild, (type(self), self.where, parts)


def _rebuild(kind: type[FxquantError], where: str, parts: dict[str, str]) -> FxquantError:
    return kind(where, **parts)


class OptionError(FxquantError, ValueError):
    """An argument is outside what is possible."""


class WeightError(FxquantError):
    """A weight cannot be quantized."""


class TraceError(FxquantError):
    """The arguments given do not run the model."""


class ShapeError(TraceError, AssertionError):
    """An input has a size for which the graph was not traced."""


class CalibrationError(FxquantError):
    """Calibration data is empty, has a wrong form or is not finite."""


class RuleError(FxquantError):
    """A rule the caller wrote matches nothing."""


class BudgetError(FxquantError):
    """No allocation of bits fits the budget."""


class AccuracyError(FxquantError):
    """The quantized model is less accurate than what was asked."""


class SaveError(FxquantError):
    """A model cannot be written."""


class LoadError(FxquantError):
    """A file is not a model that can be loaded."""


class RunError(FxquantError, RuntimeError):
    """A node of a loaded graph failed; the error of the op is its cause."""


class ProcessGroupError(FxquantError, RuntimeError):
    """Another process of a shared run failed, or is gone; no process has a result."""


def near_misses(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The entries of `names` closest in spelling to `name`, best first."""
    return difflib.get_close_matches(name, list(names), n=count, cutoff=0.4)


def cause_of(error: Exception) -> str:
    """What went wrong, without numbers of the system and names of temporary files.

    >>> cause_of(FileNotFoundError(2, "No such file or directory", "/a/.temporary-5"))
    'no such file or directory'
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:1].lower() + text[1:]


def check_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    """Raise an `OptionError` that lists the valid names unless `value` is one of `choices`."""
    choices = list(choices)
    if value in choices:
        return
    close = near_misses(str(value), choices, count=1)
    raise OptionError(
        argument,
        found=repr(value),
        needed="one of " + ", ".join(map(repr, choices)),
        remedy=f"Did you mean {close[0]!r}?" if close else "Choose one of these names.",
    )


def check_type(
    argument: str,
    value: object,
    expected: type,
    remedy: str,
    error: type[FxquantError] = OptionError,
) -> None:
    """Raise an `OptionError` (or `error`) unless `value` is an instance of `expected`.

    >>> check_type("info", 5, dict, "Pass the record.")
    Traceback (most recent call last):
    fxquant.errors.OptionError: info: got an object of type int. Expected a dict. Pass the record.
    """
    if isinstance(value, expected):
        return
    found = f"an object of type {type(value).__name__}"
    if isinstance(value, type):
        found = f"the class {value.__name__} instead of an instance"
    if isinstance(value, tuple) and any(isinstance(item, expected) for item in value):
        found = "a pair"
        remedy = "quantize returns a pair: write `qmodel, info = ...`, then pass the one needed."
    raise error(argument, found=found, needed=f"a {_public_name(expected)}", remedy=remedy)


def _public_name(kind: type) -> str:
    """The shortest path by which a class can be imported, such as `torch.nn.Module`."""
    parts = kind.__module__.split(".")
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        if path != "builtins" and getattr(sys.modules.get(path), kind.__name__, None) is kind:
            return f"{path}.{kind.__name__}"
    return kind.__name__


def check_path(argument: str, value: object, error: type[FxquantError] = OptionError) -> None:
    """Raise an `OptionError` (or `error`) unless `value` is a path."""
    if not isinstance(value, str):
        check_type(argument, value, os.PathLike, "Pass a path as a str or a pathlib.Path.", error)


def check_positive_int(argument: str, value: object) -> None:
    """Raise an `OptionError` unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(
            argument,
            found=repr(value),
            needed="a whole number of at least 1",
            remedy=f"Pass {argument} as a positive int.",
        )


def caller_level() -> int:
    """The `stacklevel` of a warning, raised where this is called, that shows the user's own line.

    It is the first one up the stack that is not in fxquant; 1 is the line of the call itself.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fxquant."):
        frame, level = frame.f_back, level + 1
    return level


def check_number(argument: str, value: object) -> None:
    """Raise an `OptionError` unless `value` is a number (perhaps an infinite one)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise OptionError(
            argument,
            found=repr(value),
            needed="a number",
            remedy=f"Pass {argument} as an int or a float.",
        )
