"""A convolution on integers takes in what stands around it, and hands integers on.

before: `d = dequantize_activation(q, s, z, x)`, `y = self.conv(d)`, `y += r`, `y = relu(y)`,
        `p = quantize_activation(y, t, w)`
after:  `p = self.conv(q, grid=(s, z), like=x, residual=r, function="relu", to_grid=(t, w), …)`

Each step is left out where the graph does not have it. Where others read the floats as well, the
call gives both. The output lies in memory with channels last.
"""

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.fusion.functions import function_of
from fxquant.fusion.strides import free_strides, let_strides_change
from fxquant.graph.effects import remove_unused, writes
from fxquant.graph.layers import has_hooks, tensor_attribute
from fxquant.graph.ops import is_addition
from fxquant.modules.activation import dequantize_activation, quantize_activation
from fxquant.modules.conv import QuantizedConv
from fxquant.modules.conv_integers import has_integers

AROUND = ("grid", "like", "residual", "function", "to_grid", "with_floats")


def fuse_convolutions(gm: GraphModule) -> None:
    """Fuse each convolution of integers with its neighbours, and move rounding into it."""
    # The last first, and again: an addition in place would keep what it reads where it is. Fused
    # with the convolution before, it writes nowhere.
    while sum(_fuse_around(gm, node) for node in reversed(list(gm.graph.nodes))):
        remove_unused(gm)
    for node in list(gm.graph.nodes):
        if is_fused_convolution(gm, node):
            _round_output(gm, node)


def is_fused_convolution(gm: GraphModule, node: Node) -> bool:
    """Whether a node is a convolution with what stood around it."""
    is_call = node.op == "call_module" and any(name in node.kwargs for name in AROUND)
    return is_call and isinstance(gm.get_submodule(str(node.target)), QuantizedConv)


def _convolution(gm: GraphModule, node: Node) -> QuantizedConv | None:
    """The layer that a node calls with nothing but a value, if it multiplies integers."""
    if node.op != "call_module" or node.kwargs or len(node.args) != 1:
        return None
    layer = gm.get_submodule(str(node.target))
    if not isinstance(layer, QuantizedConv) or has_hooks(layer):
        return None
    return layer if isinstance(node.args[0], Node) and has_integers(layer) else None


def _fuse_around(gm: GraphModule, node: Node) -> bool:
    """Whether the node was a convolution of integers that could be fused, and is now."""
    layer = _convolution(gm, node)
    if layer is None:
        return False
    source: Any = node.args[0]
    around: dict[str, Any] = {}
    if source.target is dequantize_activation and _grid(gm, source) is not None:
        source, scale, zero_point, like = source.args
        around = {"grid": (scale, zero_point), "like": like}
    elif layer.activation_arithmetic != "integers" or layer.is_product:
        return False
    chain = [node]
    residual, function = _added(gm, chain), _applied(gm, chain)
    if residual is not None:
        around["residual"] = residual
    if function is not None:
        around["function"] = function
    chain += _through_nothing(gm, chain[-1])[1:]
    last = chain[-1]
    views = free_strides(last, gm)
    if views is None or not around:
        return False
    let_strides_change(views)
    last.op, last.target, last.args, last.kwargs = "call_module", node.target, (source,), around
    for step in reversed(chain[:-1]):
        gm.graph.erase_node(step)
    return True


def _added(gm: GraphModule, chain: list[Node]) -> Node | None:
    """What is added to the last value of a chain, which grows by that step."""
    last = _through_nothing(gm, chain[-1])
    step = last[-1]
    user = _only_user(step)
    if user is None or not is_addition(user):
        return None
    operands = user.args if user.args[0] is step else user.args[::-1]
    other = operands[1]
    # What an addition in place writes into must be the convolution's own output.
    is_ours = user.args[0] is step or not writes(user, gm)
    if not isinstance(other, Node) or other is step or not is_ours:
        return None
    chain += [*last[1:], user]
    return other


def _applied(gm: GraphModule, chain: list[Node]) -> str | None:
    """The function of the last value of a chain, which grows by that step."""
    last = _through_nothing(gm, chain[-1])
    user = _only_user(last[-1])
    if user is None:
        return None
    found = function_of(gm, user, in_place=True)
    if found is None or found[1] is not last[-1] or found[2] != 1:
        return None
    if _writes_between(gm, chain[-1], user, {*chain, *last, user}):
        return None
    chain += [*last[1:], user]
    return found[0]


def _through_nothing(gm: GraphModule, node: Node) -> list[Node]:
    """A node, and steps behind it that give its value as it is, each read by the next alone."""
    found = [node]
    while (user := _only_user(found[-1])) is not None and user.op == "call_module":
        module = gm.get_submodule(str(user.target))
        if type(module) is not nn.Identity or has_hooks(module) or user.kwargs:
            break
        found.append(user)
    return found


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _writes_between(gm: GraphModule, first: Node, last: Node, own: set[Node]) -> bool:
    """Whether a node between two others writes into memory, but for some."""
    node = first.next
    while node is not last:
        if node not in own and writes(node, gm):
            return True
        node = node.next
    return False


def _round_output(gm: GraphModule, node: Node) -> None:
    """Let a fused convolution round its output where its readers do so."""
    like = node.kwargs.get("like", node.args[0])
    for user in list(node.users):
        if is_fused_convolution(gm, user) and user.kwargs.get("like") is node:
            user.kwargs = {**user.kwargs, "like": like}  # of the same dtype
    roundings = _roundings(gm, node)
    if not roundings or free_strides(node, gm) is None:
        return
    others = [user for user in node.users if user not in roundings]
    with gm.graph.inserting_before(node):
        numbers: Any = roundings[0].args[1:]
        scale, zero_point = (gm.graph.get_attr(str(number.target)) for number in numbers)
    around: dict[str, Any] = {"to_grid": (scale, zero_point), "with_floats": bool(others)}
    rounded = node
    if others:
        with gm.graph.inserting_after(node):
            rounded = gm.graph.call_function(operator.getitem, (node, 1))
            floats = gm.graph.call_function(operator.getitem, (node, 0))
        for user in others:
            user.replace_input_with(node, floats)
    for user in roundings:
        user.replace_all_uses_with(rounded)
        gm.graph.erase_node(user)
    node.kwargs = {**node.kwargs, **around}


def _roundings(gm: GraphModule, node: Node) -> list[Node]:
    """The nodes that round a value with one grid, that of the first of them."""
    grids = [
        (user, grid)
        for user in node.users
        if user.target is quantize_activation and (grid := _grid(gm, user)) is not None
    ]
    return [
        user
        for user, grid in grids
        if all(map(torch.equal, grid, grids[0][1])) and user.args[0] is node
    ]


def _grid(gm: GraphModule, node: Node) -> tuple[Tensor, ...] | None:
    """The scale and zero point of a rounding, or of its inverse; None unless they are numbers."""
    found = []
    for number in node.args[1:3]:
        if not isinstance(number, Node) or number.op != "get_attr":
            return None
        value = tensor_attribute(gm, number)
        if not isinstance(value, Tensor) or value.numel() != 1:
            return None
        found.append(value)
    return tuple(found)
