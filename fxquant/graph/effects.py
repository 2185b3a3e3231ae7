"""What running a node changes besides giving a value: memory that was there before, random numbers.

Names and schemas of torch say whether an op writes; the table of ops says whether it draws.
"""

import inspect
import operator
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.loops import calls_of, loop
from fxquant.graph.ops import is_own, op_name, op_of, target_name

_IN_PLACE_OPERATORS = frozenset(
    [
        "iadd",
        "iand",
        "iconcat",
        "ifloordiv",
        "ilshift",
        "imatmul",
        "imod",
        "imul",
        "ior",
        "ipow",
        "irshift",
        "isub",
        "itruediv",
        "ixor",
        "setitem",
        "delitem",
    ]
)


_IN_PLACE_METHODS = frozenset(f"__{name}__" for name in _IN_PLACE_OPERATORS)


def is_random(node: Node) -> bool:
    """Whether the op draws random numbers, as called here."""
    if isinstance(node.target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded not in node.target.tags:
            return False
    elif not op_of(node).random:
        return False
    if op_of(node).keeps:  # dropout, which does nothing unless it trains
        return bool(argument(node, "training", argument(node, "train", False)))
    return True


def writes(node: Node, gm: GraphModule | None = None) -> bool:
    """Whether the node changes memory that was there before: an argument, or a module's state.

    Args:
        node: any node.
        gm: its graph module; without it, modules count as writing nothing.
    """
    match node.op:
        case "call_method":
            return _is_writing_name(str(node.target)) or node.kwargs.get("out") is not None
        case "call_function":
            return _function_writes(node)
        case "call_module" if gm is not None:
            return module_writes(gm.get_submodule(str(node.target)))
    return False


def module_writes(module: nn.Module) -> bool:
    """Whether a call of `module` may change its argument or its own state.

    Of torch's own modules only those with `inplace=True` do, in evaluation mode, and embeddings
    with a `max_norm`, which scale rows of their weight; what other classes do is not known.
    """
    return any(
        getattr(part, "inplace", False) is True
        or getattr(part, "max_norm", None) is not None
        or is_foreign(part)
        or bool(part._forward_hooks or part._forward_pre_hooks)
        for part in module.modules()
    )


def is_foreign(module: nn.Module) -> bool:
    """Whether `module` runs code that fxquant does not know: it is neither torch's nor its own."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return not type(module).__module__.startswith(("torch.nn.", "fxquant."))


def calls_foreign_functions(gm: GraphModule) -> bool:
    """Whether the graph calls functions of other libraries, whose code it cannot hold."""
    known = ("torch", "fxquant", "_operator", "math", "builtins")
    modules = {
        str(getattr(node.target, "__module__", None) or "torch")
        for node in gm.graph.nodes
        if node.op == "call_function"
    }
    return not all(module.split(".")[0] in known for module in modules)


def _function_writes(node: Node) -> bool:
    target: Any = node.target
    if target is loop:
        return any(map(_function_writes, calls_of(node)))
    if is_own(target):
        return False  # an output of a model may be called `out`
    if op_name(node) in ("batch_norm", "instance_norm") and _updates_statistics(node):
        return True
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    name = target_name(target)
    if (
        getattr(target, "__module__", None) == operator.__name__
        or target in vars(operator).values()
    ):
        return name in _IN_PLACE_OPERATORS
    if node.kwargs.get("out") is not None or argument(node, "inplace", False) is True:
        return True
    if argument(node, "max_norm", None) is not None:  # embeddings scale rows of their weight
        return True
    return _is_writing_name(name)


def _updates_statistics(node: Node) -> bool:
    """Whether a norm writes into running statistics that it was given."""
    has_statistics = argument(node, "running_mean", None) is not None
    trains = argument(node, "training", False) or argument(node, "use_input_stats", False)
    return has_statistics and bool(trains)


def _is_writing_name(name: str) -> bool:
    return name in _IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__"))


def argument(node: Node, name: str, default: Any) -> Any:
    """The value of the argument called `name`, by keyword or position."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = _parameter_names(node.target)
    if name in names and names.index(name) < len(node.args):
        return node.args[names.index(name)]
    return default


@cache
def _parameter_names(target: Any) -> tuple[str, ...]:
    if isinstance(target, torch._ops.OpOverload):
        return tuple(a.name for a in target._schema.arguments)
    try:
        return tuple(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a builtin without a signature, or a method's name
        return ()


def writes_before(gm: GraphModule) -> dict[Node, int]:
    """For each node, how many nodes that write come before it.

    A value that two nodes read may be taken as one only where this number is the same for both.
    """
    found, count = {}, 0
    for node in gm.graph.nodes:
        found[node] = count
        count += writes(node, gm)
    return found


def has_effects(gm: GraphModule) -> bool:
    """Whether running a part of the graph again may give another result than running all of it.

    That is so where a node writes into memory or draws random numbers.
    """
    return any(writes(node, gm) or is_random(node) for node in gm.graph.nodes)


def remove_unused(gm: GraphModule) -> None:
    """Erase nodes whose value nobody uses, unless they write, draw, or check something."""
    for node in reversed(gm.graph.nodes):
        is_value = node.op in ("get_attr", "call_function", "call_method", "call_module")
        if is_value and not node.users and not node.is_impure() and not _has_effect(node, gm):
            gm.graph.erase_node(node)


def _has_effect(node: Node, gm: GraphModule) -> bool:
    return writes(node, gm) or is_random(node)
