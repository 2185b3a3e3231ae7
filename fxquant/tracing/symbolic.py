"""The first way: `torch.fx` symbolic tracing, with opaque nodes where a child cannot be traced."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import nn

from fxquant.graph.structures import expect_constant, named_fields, output_dict
from fxquant.tracing.signature import (
    Argument,
    ExampleInputs,
    call,
    graph_arguments,
    is_variadic,
    placeholder_order,
)


@dataclass(frozen=True)
class Capture:
    """A graph, with the children that stayed opaque and why (path -> reason)."""

    gm: torch.fx.GraphModule
    opaque: dict[str, str]


def capture_symbolic(module: nn.Module, inputs: ExampleInputs | None) -> Capture | str:
    """Trace `module` symbolically; return the reason as text if its own code cannot be traced."""
    arguments = graph_arguments(module, inputs)
    if any(is_variadic(argument) for argument in arguments):
        return "its forward takes a variable number of arguments"
    tracer = _Tracer(arguments)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        gm = torch.fx.GraphModule(module, tracer.trace(module), type(module).__name__)
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    except Exception as error:  # a user's forward may raise anything at all
        return describe_error(error)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return Capture(gm, tracer.opaque)


def describe_error(error: Exception) -> str:
    """The error's class and first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, arguments: list[Argument]) -> None:
        super().__init__(autowrap_modules=(math,))
        self.arguments = arguments
        self.opaque: dict[str, str] = {}
        self._attribute_proxies: dict[str, torch.fx.Proxy] = {}

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Make placeholders of the chosen arguments and bake the rest in."""
        values = {}
        order = placeholder_order(self.arguments)
        for argument in order:
            default = (argument.value,) if argument.is_constant else ()
            values[argument.name] = self.create_proxy("placeholder", argument.name, default, {})
        for argument in order:
            if argument.is_constant:
                proxy = values.pop(argument.name)
                expect_constant(proxy, argument.value, argument.name)

        def run(root: nn.Module) -> Any:
            return _plain_output(call(root.forward, self.arguments, values))

        return run, [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Torch's own modules are leaves, unless there is a linear layer inside them."""
        if isinstance(m, nn.Linear):
            return type(m).forward is nn.Linear.forward
        has_linear = any(isinstance(child, nn.Linear) for child in m.modules())
        return super().is_leaf_module(m, module_qualified_name) and not has_linear

    def getattr(
        self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, torch.fx.Proxy]
    ) -> Any:
        """Remember the cache, to take entries of a failed child out again."""
        self._attribute_proxies = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace into `m`; if its code cannot be traced, make it one opaque node instead."""
        path = self.path_of_module(m)
        last = next(reversed(self.graph.nodes), None)
        stack = self.module_stack.copy()
        opaque = dict(self.opaque)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # a user's forward may raise anything at all
            if self.is_leaf_module(m, path):
                raise
            self.module_stack = stack
            self._erase_after(last)
            self.opaque = {**opaque, path: describe_error(error)}
            return self.create_proxy("call_module", path, args, kwargs)

    def _erase_after(self, last: torch.fx.Node | None) -> None:
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)
        alive = set(self.graph.nodes)
        for name, proxy in list(self._attribute_proxies.items()):
            if proxy.node not in alive:
                del self._attribute_proxies[name]


def _plain_output(value: Any) -> Any:
    """Replace model-output classes by `OutputDict`s, which every graph can build."""
    fields = named_fields(value)
    if fields is not None:
        present = {k: _plain_output(v) for k, v in fields.items() if v is not None}
        return output_dict(**present)
    if type(value) is dict:
        return {k: _plain_output(v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_plain_output(v) for v in value)
    return value
