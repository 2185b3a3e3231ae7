"""Which arguments of a model's `forward` become inputs of the graph."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import TraceError
from fxquant.graph.calls import VARIADIC, Call

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size, slice)


@dataclass(frozen=True)
class Argument:
    """One argument of `forward` and how the graph takes it.

    An input is a placeholder; a constant one (a flag that was passed) is a placeholder that must
    keep its value; any other argument is left out and has its default baked in. Of `*args` and
    `**kwargs`, each value that was passed is an argument of its own. What the example passes by
    position is passed so: hooks see the difference.
    """

    name: str
    kind: Any
    value: Any
    is_input: bool
    is_constant: bool
    is_positional: bool = False


def graph_arguments(module: nn.Module, inputs: Call | None) -> list[Argument]:
    """The arguments of `module.forward`, in the order of its signature.

    Without example inputs, arguments that have a default are left out.

    Raises:
        TraceError: the example inputs do not fit the signature.
    """
    signature = inspect.signature(module.forward)
    given: dict[str, Any] = {}
    if inputs is not None:
        try:
            given = dict(signature.bind(*inputs.args, **inputs.kwargs).arguments)
        except TypeError as error:
            raise TraceError(
                f"{type(module).__name__}.forward",
                found=f"example inputs that do not fit: {error}",
                needed=f"arguments of forward{signature}",
                remedy="Pass a tensor, a tuple of positional or a dict of keyword arguments.",
            ) from error
    arguments: list[Argument] = []
    positional = len(inputs.args) if inputs is not None else len(signature.parameters)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            values = enumerate(given.get(name, ()))
            arguments += [_given(f"{name}_{i}", parameter.kind, value) for i, value in values]
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            kind = inspect.Parameter.KEYWORD_ONLY
            arguments += [_given(key, kind, value) for key, value in given.get(name, {}).items()]
        elif name in given:
            by_position = len(arguments) < positional
            arguments.append(_given(name, parameter.kind, given[name], by_position))
        else:
            is_required = parameter.default is parameter.empty
            value = None if is_required else parameter.default
            is_input = inputs is None and is_required
            by_position = is_input and parameter.kind is not parameter.KEYWORD_ONLY
            arguments.append(Argument(name, parameter.kind, value, is_input, False, by_position))
    return arguments


def _given(name: str, kind: Any, value: Any, is_positional: bool = False) -> Argument:
    has_tensors = bool(Call((value,)).tensors())
    is_constant = not has_tensors and _is_data(value)
    is_positional = is_positional or kind in _BY_POSITION
    return Argument(name, kind, value, True, is_constant, is_positional)


def unfit_argument(arguments: list[Argument]) -> str | None:
    """Why an argument cannot be an input of a traced graph: it is an object of some class."""
    for argument in arguments:
        if argument.is_input and not _is_data(argument.value):
            return f"its argument {argument.name} is a {type(argument.value).__name__}"
    return None


def unknown_argument(module: nn.Module) -> str | None:
    """Why nobody can tell without an example what `forward` takes, or None.

    Inputs in `*args` have no number, and those in `**kwargs` no names; the latter are options where
    there are other inputs.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())
    for parameter in parameters:
        has_others = any(p.kind not in VARIADIC for p in parameters)
        if parameter.kind is parameter.VAR_POSITIONAL:
            return f"its inputs are in *{parameter.name}, and no example tells how many"
        if parameter.kind is parameter.VAR_KEYWORD and not has_others:
            return f"its inputs are in **{parameter.name}, and no example tells which"
    return None


def _is_data(value: Any) -> bool:
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return True
    if type(value) in (list, tuple):
        return all(map(_is_data, value))
    return type(value) is dict and all(map(_is_data, value.values()))


def is_variadic(module: nn.Module) -> bool:
    """Whether `forward` takes `*args` or `**kwargs`."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind in VARIADIC for parameter in parameters)


def placeholders(arguments: list[Argument]) -> list[tuple[Argument, tuple[Any, ...]]]:
    """The graph's inputs in the order of the signature, each with its default in a tuple.

    A constant has its value as default, unless an argument without one follows.
    """
    chosen = [a for a in arguments if a.is_input]
    last = max((i for i, a in enumerate(chosen) if not a.is_constant), default=-1)
    return [(a, (a.value,) if a.is_constant and i > last else ()) for i, a in enumerate(chosen)]


def call(forward: Any, arguments: list[Argument], values: dict[str, Any]) -> Any:
    """Call `forward` with `values` for its inputs, the recorded values of flags, and no others."""
    positional, keyword = [], {}
    for argument in arguments:
        value = values.get(argument.name, argument.value)
        if argument.is_positional:
            positional.append(value)
        elif argument.is_input:
            keyword[argument.name] = value
    return forward(*positional, **keyword)
