"""The layers of a traced model: their names, where they are called, and putting others in place.

A traced model is one graph. Most of its layers are nodes; the layers inside an opaque module (one
that could not be traced and keeps its own Python code) are reached through that module's node. The
attributes of a graph have names made by fxquant, since Python and torch.fx do not allow every name
that a module may have; what the user calls a module is data beside the graph.
"""

import inspect
import keyword
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.weight_forms import form_of

NAMES_KEY = "fxquant_names"  # gm.meta: the user's name of each target that is spelled otherwise
ROOT = "model"  # what the model itself is called
WRAPPED = "_self"  # the attribute of a graph that holds the whole model, where it is one layer
_HOOKS = tuple(key for key in vars(nn.Module()) if "hooks" in key)
_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
# Parts of a target that would hide what a graph module has itself.
RESERVED = frozenset(dir(GraphModule)) | frozenset(vars(nn.Module())) | {WRAPPED, "meta"}


@dataclass(frozen=True)
class Site:
    """A place where a module runs.

    Attributes:
        gm: the graph.
        node: the node that runs it: its own, or that of the opaque module around it.
        target: its path from the graph's root.
        name: the user's name of it.
        module: the module itself.
    """

    gm: GraphModule
    node: Node
    target: str
    name: str
    module: nn.Module

    @property
    def is_inside(self) -> bool:
        """Whether it runs inside an opaque module."""
        return self.target != str(self.node.target)

    @property
    def input(self) -> Node | None:
        """The node of the value that it reads; None where that is no value of the graph."""
        if self.is_inside or not self.node.args:
            return None
        source = self.node.args[0]
        return source if isinstance(source, Node) else None


def sites(gm: GraphModule) -> Iterator[Site]:
    """Every call of a module in the order of the graph; of an opaque one, its layers instead."""
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        target = str(node.target)
        module = gm.get_submodule(target)
        inner = list(inner_layers(module))
        if not inner:
            yield Site(gm, node, target, user_name(gm, target), module)
        for path, layer in inner:
            full = f"{target}.{path}"
            yield Site(gm, node, full, user_name(gm, full), layer)


def inner_layers(
    module: nn.Module, is_wanted: Callable[[nn.Module], bool] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """The layers inside a module that is none itself, by path; not the parts of a layer.

    Those below code that asks for parameters by name are left out: a quantized layer has none.

    Args:
        module: the outer one.
        is_wanted: tells a layer; by default quantized layers and those that can be are.
    """
    is_wanted = is_wanted or is_layer
    if is_wanted(module):
        return
    closed = [path for path, part in module.named_modules() if _asks_for_parameters(part)]
    for path, part in module.named_modules():
        if (
            path
            and is_wanted(part)
            and not any(f"{path}.".startswith(f"{c}." if c else "") for c in closed)
        ):
            closed.append(path)
            yield path, part


_BY_NAME = frozenset(("named_parameters", "functional_call", "get_parameter", "_parameters"))


def _asks_for_parameters(module: nn.Module) -> bool:
    """Whether a forward of the user's names a method that gives or replaces parameters."""
    code = getattr(inspect.getattr_static(type(module), "forward", None), "__code__", None)
    if code is None or type(module).__module__.startswith("torch."):
        return False
    return not _BY_NAME.isdisjoint(code.co_names)


def is_layer(module: nn.Module) -> bool:
    """Whether `module` is a quantized layer, or a float one that can become one."""
    return isinstance(module, QuantizedLayer) or form_of(module) is not None


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` computes x · weightᵀ + bias from its own parameters, by torch's own code.

    Its hooks do not count: they run before and after that.
    """
    own = type(module)
    return (
        isinstance(module, nn.Linear)
        and own.forward is nn.Linear.forward
        and own.__call__ is nn.Module.__call__
        and "forward" not in vars(module)
        and isinstance(module._parameters.get("weight"), Tensor)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether code of the user's runs before or after the module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def layer_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a layer in order, the input first, however it was called."""
    given = (*args, *kwargs.values()) if args else (kwargs["input"],)
    return tuple(unbatched(a) if isinstance(a, Tensor) else a for a in given)


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a layer, however it was called."""
    value = layer_arguments(args, kwargs)[0]
    assert isinstance(value, Tensor)  # a layer takes nothing else
    return value


def unbatched(tensor: Tensor) -> Tensor:
    """The whole tensor where `torch.vmap` shows one row at a time; a row must not leave it."""
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def replace_layer(layer: nn.Module, other: nn.Module) -> None:
    """Let the object `layer` become what `other` is, wherever it is reached from.

    The object stays the same, so a plain list, a second name or a closure that holds it sees the
    new layer too. Hooks and plain attributes that the user gave it stay.
    """
    kept = {k: v for k, v in vars(layer).items() if k in _HOOKS or k not in vars(nn.Module())}
    made = dict(vars(other))
    made.update({key: type(made[key])(made[key]) for key in _STATE})
    layer.__class__ = type(other)
    own = {**kept, **made, **{key: kept[key] for key in _HOOKS}, "training": other.training}
    vars(layer).clear()
    vars(layer).update(own)


def keep_bias_absent(layer: nn.Module, made: nn.Module) -> None:
    """Let `made` have no bias where `layer` has none: an opaque module's code may look at it."""
    if getattr(layer, "bias", None) is None and made._buffers.get("bias") is not None:
        made._buffers["bias"] = None


@contextmanager
def replaced(layer: nn.Module, other: nn.Module) -> Iterator[None]:
    """Let `layer` be what `other` is for a while."""
    own, state = type(layer), dict(vars(layer))
    replace_layer(layer, other)
    try:
        yield
    finally:
        layer.__class__ = own
        vars(layer).clear()
        vars(layer).update(state)


def user_name(gm: GraphModule, target: str) -> str:
    """What the user calls the module or tensor at `target`; the model itself is called `model`."""
    names: dict[str, str] = gm.meta.get(NAMES_KEY, {})
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        known = names.get(".".join(parts[:length]))
        if known is not None:
            return ".".join([*filter(None, [known]), *parts[length:]]) or ROOT
    return target


def name_below(gm: GraphModule, path: str) -> None:
    """Let the user's names of all that a graph holds begin with `path`: it is a part of a model."""
    names: dict[str, str] = dict(gm.meta.get(NAMES_KEY, {}))
    for owned in (gm._modules, gm._parameters, gm._buffers):
        for target in owned:
            names.setdefault(target, target)
    gm.meta[NAMES_KEY] = {
        target: ".".join(filter(None, (path, name))) for target, name in names.items()
    }


def target_of(path: str, taken: Iterable[str] = ()) -> str:
    """A target for the user's `path`: the same where Python and torch.fx allow it.

    >>> target_of("encoder.fc"), target_of("block1-0.class"), target_of("graph")
    ('encoder.fc', 'block1_0.class_', 'graph_')
    """
    target = ".".join(map(_identifier, path.split(".")))
    taken, number, free = set(taken), 1, target
    while free in taken:
        number += 1
        free = f"{target}_{number}"
    return free


def _identifier(part: str) -> str:
    allowed = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in part)
    is_odd = keyword.iskeyword(allowed) or allowed in RESERVED or allowed.startswith("__")
    return f"{allowed}_" if is_odd else allowed or "_"


def finish(gm: GraphModule) -> None:
    """Check and recompile the graph, once after all changes: each time costs a walk of it."""
    with warnings.catch_warnings(action="ignore"):  # the weight of a quantized layer is computed
        gm.graph.lint()
    gm.recompile()


def free_name(gm: GraphModule, name: str) -> str:
    """`name`, or the first of `name_2`, `name_3` … that `gm` has no attribute of."""
    number, free = 1, name
    while hasattr(gm, free):
        number += 1
        free = f"{name}_{number}"
    return free


def tensor_attribute(gm: GraphModule, node: Node) -> Any:
    """The value a `get_attr` node reads."""
    owner, _, name = str(node.target).rpartition(".")
    return getattr(gm.get_submodule(owner), name)
