"""Which arguments of a model's `forward` become inputs of the graph."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.errors import TraceError
from fxquant.graph.structures import tensors_in

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class ExampleInputs:
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, item: object) -> "ExampleInputs":
        """A tensor is one argument, a tuple or list are positional, a mapping has keywords."""
        if isinstance(item, ExampleInputs):
            return item
        if isinstance(item, Mapping):
            return cls((), dict(item))
        if isinstance(item, tuple | list):
            return cls(tuple(item))
        return cls((item,))


@dataclass(frozen=True)
class Argument:
    """One argument of `forward` and how the graph takes it.

    An input is a placeholder; a constant one (a flag that was passed) is a placeholder that must
    keep its value; any other argument is left out and has its default baked in.
    """

    name: str
    kind: Any
    value: Any
    is_input: bool
    is_constant: bool


def graph_arguments(module: nn.Module, inputs: ExampleInputs | None) -> list[Argument]:
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
    arguments = []
    for name, parameter in signature.parameters.items():
        is_required = parameter.default is parameter.empty and parameter.kind not in _VARIADIC
        value = given.get(name, None if is_required else parameter.default)
        is_input = name in given or (inputs is None and is_required)
        has_tensors = any(True for _ in tensors_in(value)) or isinstance(value, Tensor)
        is_constant = is_input and inputs is not None and not has_tensors
        if parameter.kind in _VARIADIC and name not in given:
            continue
        arguments.append(Argument(name, parameter.kind, value, is_input, is_constant))
    return arguments


def is_variadic(argument: Argument) -> bool:
    """Whether the argument is `*args` or `**kwargs`."""
    return argument.kind in _VARIADIC


def placeholder_order(arguments: list[Argument]) -> list[Argument]:
    """The graph's inputs: those with a default (constants) last, as Python requires."""
    chosen = [a for a in arguments if a.is_input]
    return [a for a in chosen if not a.is_constant] + [a for a in chosen if a.is_constant]


def call(forward: Any, arguments: list[Argument], values: dict[str, Any]) -> Any:
    """Call `forward` with `values` for its inputs and the recorded values for the rest."""
    positional, keyword = [], {}
    for argument in arguments:
        value = values.get(argument.name, argument.value)
        if argument.kind is inspect.Parameter.KEYWORD_ONLY:
            keyword[argument.name] = value
        else:
            positional.append(value)
    return forward(*positional, **keyword)


def clone(values: Any) -> Any:
    """`values` with every tensor cloned: a forward may change its arguments."""
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, values)
