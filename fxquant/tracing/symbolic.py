"""The first way: `torch.fx` symbolic tracing, with opaque nodes where a child cannot be traced."""

import dis
import inspect
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy
from torch.overrides import TorchFunctionMode

from fxquant.graph.calls import Call
from fxquant.graph.layers import has_hooks, is_plain_linear
from fxquant.graph.left_alone import left_alone
from fxquant.graph.ops import OPS, target_name
from fxquant.graph.structures import (
    expect_constant,
    is_named_tuple,
    named_fields,
    named_tuple,
    output_dict,
)
from fxquant.tracing.capture import Capture, describe_error, left_out
from fxquant.tracing.proxies import NumberProxy, TensorProxy, record_attributes, traceable
from fxquant.tracing.replacements import FUNCTION_REPLACEMENTS
from fxquant.tracing.signature import (
    Argument,
    call,
    graph_arguments,
    placeholders,
    unfit_argument,
    unknown_argument,
)


def capture_symbolic(
    module: nn.Module, inputs: Call | None, *, see_through: bool = True
) -> Capture | str:
    """Trace `module` symbolically; return the reason as text if its own code cannot be traced.

    Args:
        module: a working copy; it is left as it was.
        inputs: an example call, or None.
        see_through: trace into functions that a library marked with `torch.fx.wrap`, too.
    """
    arguments = graph_arguments(module, inputs)
    unfit = unfit_argument(arguments) or (unknown_argument(module) if inputs is None else None)
    if unfit is not None:
        return unfit
    tracer = _Tracer(arguments, is_verified=inputs is not None)
    try:
        with left_alone(module), traceable(see_through):
            graph = tracer.trace(module)
            constants = {
                str(n.target): vars(module)[n.target]
                for n in graph.nodes
                if n.op == "get_attr" and str(n.target).startswith("_tensor_constant")
            }
            changed = tracer.changed_attribute(module) if inputs is None else None
    except Exception as error:  # a user's forward may raise anything at all
        return describe_error(error)
    if changed is not None:
        return f"its forward changes the attribute {changed!r}"
    return Capture(graph, constants, tracer.opaque, left_out=tracer.left_out)


class _UnseenError(Exception):
    """The forward does something that a graph would lose."""


class _NothingHidden(TorchFunctionMode):
    """Refuses what would become a constant of the graph although it is none.

    That is a draw of random numbers, and what is computed from parameters that were not read as
    attributes (`dict(self.fc.named_parameters())`): the graph would not know whose they are.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        row = OPS.get(target_name(func))
        if row is not None and row.random and not row.keeps:
            raise _UnseenError(f"it draws random numbers of a fixed size ({row.name})")
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and any(_is_weight(a) for a in args):
            raise _UnseenError("it computes with parameters that it did not read as attributes")
        return result


def _is_weight(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and value.ndim > 1


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, arguments: list[Argument], *, is_verified: bool) -> None:
        super().__init__(autowrap_modules=(math,))
        self.arguments, self.is_verified = arguments, is_verified
        self.opaque: dict[str, str] = {}
        self.left_out: list[str] = []
        self._attribute_proxies: dict[str, Proxy] = {}
        self._numbers: set[Node] = set()
        self._before: dict[nn.Module, dict[str, tuple[Any, int]]] = {}
        self._parameters: dict[nn.Module, tuple[int, ...]] = {}
        self._autocasts = torch.is_autocast_enabled("cpu")
        self._troubles = 0

    def trace(self, root: Any, concrete_args: Any = None) -> Graph:
        """Record the graph of a module."""
        self._before = {m: _plain_attributes(m) for m in root.modules()}
        self._parameters = {m: _parameters_of(m) for m in root.modules()}
        with _NothingHidden():
            graph = super().trace(root, concrete_args)
        if self._troubles:
            raise _UnseenError("its forward catches the error of a branch on values")
        return graph

    def to_bool(self, obj: Proxy) -> bool:
        """Refuse, and remember it: a forward that catches the error has taken another way."""
        self._troubles += 1
        return super().to_bool(obj)

    def iter(self, obj: Proxy) -> Any:
        """Iterate where the length is known; else refuse, and remember it."""
        count = self._length(obj.node)
        if count is not None:
            parts: Any = obj
            return iter([parts[i] for i in range(count)])
        self._troubles += 1
        found = super().iter(obj)
        self._troubles -= 1
        return found

    def _length(self, node: Node) -> int | None:
        """The number of parts of a parameter that was split, or None."""
        source: Any = node.args[0] if node.args else None
        if not isinstance(source, Node) or source.op != "get_attr":
            return None
        if target_name(node.target) not in ("chunk", "split", "unbind", "tensor_split"):
            return None
        owner, _, name = str(source.target).rpartition(".")
        value = self.root.get_submodule(owner)._parameters.get(name)
        function: Any = getattr(value, target_name(node.target), None)
        try:
            return len(function(*node.args[1:], **node.kwargs))
        except Exception:  # arguments that depend on the input
            return None

    def changed_attribute(self, module: nn.Module) -> str | None:
        """The first plain attribute that tracing changed, as the forward would, or None."""
        for path, part in module.named_modules():
            before, now = self._before.get(part, {}), _plain_attributes(part)
            for name in now:
                if not name.startswith("_tensor_constant") and _differ(before.get(name), now[name]):
                    return f"{path}.{name}".lstrip(".")
        return None

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Make placeholders of the chosen arguments and bake the rest in."""
        # In the code of the graph, `self` is the graph: no value may take its name.
        self.graph._graph_namespace.create_name("self", None)
        values: dict[str, Any] = {}
        inputs = placeholders(self.arguments)
        for argument, default in inputs:
            values[argument.name] = self.create_proxy("placeholder", argument.name, default, {})
        for argument, _ in inputs:
            if argument.is_constant:
                expect_constant(values.pop(argument.name), argument.value, argument.name)
            elif not isinstance(argument.value, Tensor) and argument.value is not None:
                values[argument.name] = self._opened(values[argument.name], argument.value)

        def run(root: nn.Module) -> Any:
            return self._plain_output(call(root, self.arguments, values))

        return run, [self.root]

    def _opened(self, proxy: Any, value: Any) -> Any:
        """A container argument as a container of proxies, of the class that the forward expects."""
        if type(value) in (list, tuple):
            return type(value)(self._opened(proxy[i], v) for i, v in enumerate(value))
        if type(value) is dict:
            return {k: self._opened(proxy[k], v) for k, v in value.items()}
        return proxy if isinstance(value, Tensor) else value

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Torch's own modules are leaves, unless there is a linear layer or other code inside."""
        if m is self.root:
            return False
        if isinstance(m, torch.jit.ScriptModule):
            return True
        if (
            _parameters_of(m) != self._parameters.get(m)
            or type(m).__call__ is not nn.Module.__call__
        ):
            return False
        if any(has_hooks(part) or "forward" in vars(part) for part in m.modules()):
            return False
        if isinstance(m, nn.Linear):
            return is_plain_linear(m)
        has_linear = any(isinstance(child, nn.Linear) for child in m.modules())
        return super().is_leaf_module(m, module_qualified_name) and not has_linear

    def proxy(self, node: Node) -> Proxy:
        """A proxy that tells whether it is a tensor, as far as that is known."""
        if self._is_number(node):
            self._numbers.add(node)
            return NumberProxy(node, self)
        return TensorProxy(node, self)

    def _is_number(self, node: Node) -> bool:
        if node.op == "placeholder":
            given = next((a for a in self.arguments if a.name == node.target), None)
            return given is None or not isinstance(given.value, Tensor | None)
        if node.op not in ("call_function", "call_method"):
            return False
        name = target_name(node.target)
        if name == "getattr":
            return node.args[1] not in ("T", "mT", "H", "mH", "data", "real", "imag", "grad")
        row = OPS.get(name)
        if (row is not None and row.scale == "inquiry") or name in _GIVES_NUMBERS:
            return True
        operands = node.all_input_nodes
        is_python = getattr(node.target, "__module__", None) in ("_operator", "math", "builtins")
        return is_python and bool(operands) and all(n in self._numbers for n in operands)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        *other: Any,
        **options: Any,
    ) -> Any:
        """Record a call, or trace into what takes its place."""
        if torch.is_autocast_enabled("cpu") != self._autocasts:
            raise _UnseenError("it runs under autocast")
        if kind == "call_method" and not hasattr(Tensor, target):
            raise _UnseenError(f"it calls .{target}() of an argument that is no tensor")
        if kind == "call_function" and target in FUNCTION_REPLACEMENTS:
            return FUNCTION_REPLACEMENTS[target](*args, **kwargs)
        return super().create_proxy(kind, target, args, kwargs, name, type_expr, *other, **options)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        """Remember the cache, to take entries of a failed child out again."""
        self._attribute_proxies = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace into `m`; if its code cannot be traced, make it one opaque node instead."""
        path = self.path_of_module(m)
        if not self.is_verified and _catches_errors(m):
            raise _UnseenError(f"the forward of {path or 'the model'} catches errors")
        record_attributes(args, kwargs)  # here, since what the child records may be erased
        last = next(reversed(self.graph.nodes), None)
        stack, troubles = self.module_stack.copy(), self._troubles
        opaque = dict(self.opaque)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # a user's forward may raise anything at all
            if m is self.root or self.is_leaf_module(m, path):
                raise
            self.module_stack, self._troubles = stack, troubles
            self._erase_after(last)
            self.opaque = {**opaque, path: describe_error(error)}
            return self.create_proxy("call_module", path, args, kwargs)

    def _erase_after(self, last: Node | None) -> None:
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)
        alive = set(self.graph.nodes)
        for name, proxy in list(self._attribute_proxies.items()):
            if proxy.node not in alive:
                del self._attribute_proxies[name]

    def _plain_output(self, value: Any, where: str = "output") -> Any:
        """Replace classes of outputs by ones that every graph can build."""
        if isinstance(value, Proxy | Tensor) or value is None:
            return value
        if is_named_tuple(value):
            parts = [self._plain_output(v, f"{where}.{k}") for k, v in value._asdict().items()]
            return named_tuple(type(value).__name__, tuple(value._fields), *parts)
        fields = named_fields(value)
        if fields is not None or type(value) is dict:
            named: dict[Any, Any] = {}
            for key, part in (value if fields is None else fields).items():
                plain = self._plain_output(part, f"{where}.{key}")
                if plain is not _LEFT_OUT:
                    named[key] = plain
            return named if fields is None else output_dict(**named)
        if type(value) in (tuple, list):
            listed = [self._plain_output(v, f"{where}[{i}]") for i, v in enumerate(value)]
            return type(value)(v for v in listed if v is not _LEFT_OUT)
        if isinstance(value, bool | int | float | str):
            return value
        self.left_out.append(left_out(where, value))
        return _LEFT_OUT


_LEFT_OUT = object()
_GIVES_NUMBERS = ("item", "tolist", "stride", "dtype_limit")


def _catches_errors(module: nn.Module) -> bool:
    """Whether a forward of the user's has an `except` clause: which way it takes is not traced."""
    code = getattr(inspect.getattr_static(type(module), "forward", None), "__code__", None)
    if code is None or type(module).__module__.startswith("torch."):
        return False
    return any(step.opname == "CHECK_EXC_MATCH" for step in dis.get_instructions(code))


def _parameters_of(module: nn.Module) -> tuple[int, ...]:
    """Which tensors are a module's own parameters: a forward may lend it others for a call."""
    return tuple(id(p) for p in module._parameters.values())


def _plain_attributes(module: nn.Module) -> dict[str, tuple[Any, int]]:
    """Each buffer and each attribute that is no module or tensor, with the length of containers.

    The values themselves are held: the identity of one that is gone may become another's.
    """
    found: dict[str, tuple[Any, int]] = {}
    for name, value in vars(module).items():
        if name.startswith("_") and name in _OWN:
            continue
        size = len(value) if isinstance(value, list | dict | set | deque) else 0
        found[name] = (value, size)
    for name, buffer in module._buffers.items():
        found[name] = (buffer, 0)
    return found


def _differ(before: tuple[Any, int] | None, now: tuple[Any, int]) -> bool:
    return before is None or before[0] is not now[0] or before[1] != now[1]


_OWN = frozenset(vars(nn.Module()))
