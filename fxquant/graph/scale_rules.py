"""How a scale of channels passes through ops, by the column `scale` of the table of ops.

A channel map says which channel scales each element of a value: an integer tensor that broadcasts
to the value's shape, with -1 where nothing is scaled. Two ways lead through an op: from its output
back to the operands that have to carry the scale (`propagate_back`), and from an operand on to the
output (`propagate_forward`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxquant.graph.ops import op_name, op_of

MOVES = ("move", "split")
AFFINE_AT = {
    "layer_norm": (2, 3),
    "rms_norm": (2,),
}  # where weight and bias are among the arguments


class CannotScaleError(Exception):
    """Why no scale can pass; the text completes "no fold: ..."."""


@dataclass(frozen=True)
class Values:
    """What one run of the graph showed.

    Attributes:
        shapes: of each node whose value is a tensor.
        others: the values of all other nodes (sizes, tuples, None).
    """

    shapes: Mapping[Node, torch.Size]
    others: Mapping[Node, Any]


def is_sum(node: Node) -> bool:
    """Whether `node` adds or subtracts without further options."""
    return op_of(node).scale == "sum" and not node.kwargs and len(node.args) == 2


def compress(channel_map: Tensor) -> Tensor:
    """`channel_map` with each dimension along which it is constant reduced to one element."""
    for axis in range(channel_map.ndim):
        first = channel_map.narrow(axis, 0, 1)
        if channel_map.shape[axis] > 1 and bool((channel_map == first).all()):
            channel_map = first
    return channel_map


def propagate_back(
    node: Node, channel_map: Tensor, values: Values, tie: Callable[[Tensor, Tensor], None]
) -> list[list[tuple[Node, Tensor]]]:
    """Which operands may carry a channel map of the output instead.

    Args:
        node: a `call_function` or `call_method` node.
        channel_map: of its output.
        values: of the graph.
        tie: is told pairs of channels that must have one scale.

    Returns:
        Alternatives, each a list of operands with their channel maps.

    Raises:
        CannotScaleError: no operand can carry it.
    """
    name, rule = op_name(node), op_of(node).scale
    operands = [a for a in node.args if isinstance(a, Node) and a in values.shapes]
    if rule == "homogeneous" and operands:
        return [[(operands[0], channel_map)]]
    if rule == "product" and len(set(operands)) == len(operands):
        fitting = [o for o in operands if _fits(channel_map, values.shapes[o])]
        return [[(o, _cut(channel_map, values.shapes[o]))] for o in fitting]
    if rule == "quotient" and operands[:1] == [node.args[0]]:
        return (
            [[(operands[0], channel_map)]] if _fits(channel_map, values.shapes[operands[0]]) else []
        )
    if is_sum(node) and len(operands) == 2:
        fit = all(_fits(channel_map, values.shapes[o]) for o in operands)
        mapped = [(o, _cut(channel_map, values.shapes[o])) for o in dict.fromkeys(operands)]
        return [mapped] if fit else []
    if rule == "norm":
        if channel_map.numel() != channel_map.shape[-1]:
            raise CannotScaleError("the scale differs between tokens")
        found = [
            _argument(node, i, n) for i, n in zip(AFFINE_AT[name], ("weight", "bias"), strict=False)
        ]
        affine = [n for n in found if isinstance(n, Node)]
        return [[(n, channel_map.flatten()) for n in affine]] if found[0] in affine else []
    if rule == "matmul" and len(operands) == 2:
        return [[_back_through_matmul(channel_map, operands, values)]]
    if rule == "attention":
        value = _argument(node, 2, "value")
        return [[(value, _back_through_attention(node, channel_map, values.shapes[value], tie))]]
    if rule in MOVES:
        source = _moved(node)
        if source in values.shapes:
            return [[(source, _back_through_moved(node, source, channel_map, values, tie))]]
    raise CannotScaleError(f"{name} ({node.name}) does not commute with a scale")


def propagate_forward(
    node: Node, operand: Node, channel_map: Tensor, values: Values
) -> list[tuple[Node, Tensor]]:
    """Which values carry the channel map after `node` has used the mapped `operand`.

    Raises:
        CannotScaleError: the op does not commute with the scale.
    """
    name, rule = op_name(node), op_of(node).scale
    if rule == "inquiry" or (name == "getattr" and node not in values.shapes):
        return []
    uses = [a for a in node.args if a is operand]
    is_plain = len(uses) == 1 and operand not in node.kwargs.values()
    is_first = bool(node.args) and node.args[0] is operand
    if is_plain and (
        (rule in ("homogeneous", "quotient") and is_first) or rule == "product" or is_sum(node)
    ):
        return [(node, _raise_rank(channel_map, len(values.shapes[node])))]
    if is_plain and rule == "matmul":
        inner = -1 if is_first else -2
        if channel_map.ndim >= 2 and channel_map.shape[inner] == 1:
            return [(node, _raise_rank(channel_map, len(values.shapes[node])))]
    if rule == "attention" and _argument(node, 2, "value") is operand and is_plain:
        return [(node, _forward_through_attention(node, channel_map, values))]
    if is_plain and rule in MOVES and _moved(node) is operand:
        return _forward_through_moved(node, operand, channel_map, values)
    raise CannotScaleError(f"{name} ({node.name}) reads it too and does not commute with a scale")


def _fits(channel_map: Tensor, shape: torch.Size) -> bool:
    """Whether a value of `shape`, which broadcasts against the map's, has a place for it."""
    missing = channel_map.ndim - len(shape)
    leading, rest = channel_map.shape[:missing], channel_map.shape[missing:]
    return all(n == 1 for n in leading) and all(
        n in (1, size) for n, size in zip(rest, shape, strict=True)
    )


def _cut(channel_map: Tensor, shape: torch.Size) -> Tensor:
    """The channel map without the dimensions that a value of `shape` does not have."""
    while channel_map.ndim > len(shape):
        channel_map = channel_map[0]
    return channel_map


def _raise_rank(channel_map: Tensor, rank: int) -> Tensor:
    return channel_map.reshape((1,) * (rank - channel_map.ndim) + tuple(channel_map.shape))


def _argument(node: Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _back_through_matmul(
    channel_map: Tensor, operands: list[Node], values: Values
) -> tuple[Node, Tensor]:
    left, right = operands
    if channel_map.ndim < 2 or len(values.shapes[right]) < 2 or len(values.shapes[left]) < 2:
        raise CannotScaleError("a product with a vector has no place for a scale")
    operand = right if channel_map.shape[-2] == 1 else left
    inner = channel_map.shape[-2 if operand is right else -1]
    if inner != 1 or not _fits(channel_map, values.shapes[operand]):
        raise CannotScaleError("no operand of the matrix product has a place for the scale")
    return operand, _cut(channel_map, values.shapes[operand])


def _heads(node: Node, shape: torch.Size, channel_map: Tensor) -> int:
    """How many query heads share one of the value's: 1 without grouped queries."""
    if not node.kwargs.get("enable_gqa") or channel_map.ndim < 3 or channel_map.shape[-3] == 1:
        return 1
    return channel_map.shape[-3] // shape[-3]


def _back_through_attention(
    node: Node, channel_map: Tensor, shape: torch.Size, tie: Callable[[Tensor, Tensor], None]
) -> Tensor:
    if channel_map.shape[-2] != 1:
        raise CannotScaleError("the scale differs between tokens")
    shared = _heads(node, shape, channel_map)
    if shared > 1:
        grouped = channel_map.unflatten(-3, (-1, shared))
        channel_map = grouped.select(-3, 0)
        tie(grouped, channel_map.unsqueeze(-3).expand_as(grouped))
    if not _fits(channel_map, shape):
        raise CannotScaleError("the value has no place for the scale")
    return channel_map


def _forward_through_attention(node: Node, channel_map: Tensor, values: Values) -> Tensor:
    if channel_map.shape[-2] != 1:
        raise CannotScaleError("the scale differs between tokens")
    heads = values.shapes[node][-3] if len(values.shapes[node]) > 2 else 1
    if node.kwargs.get("enable_gqa") and channel_map.ndim > 2 and 1 < channel_map.shape[-3] < heads:
        channel_map = channel_map.repeat_interleave(heads // channel_map.shape[-3], dim=-3)
    return channel_map


def _moved(node: Node) -> Any:
    """The value whose elements `node` moves: for a part of a split, what was split."""
    source = node.args[0] if node.args else None
    if op_name(node) == "getitem" and isinstance(source, Node) and op_of(source).scale == "split":
        return source.args[0]
    return source


def _positions(node: Node, source: Node, values: Values) -> Any:
    """The op run on the numbers of its input's elements: where each element comes from."""
    shape = values.shapes[source]
    numbers = torch.arange(shape.numel()).reshape(shape)

    def run(part: Node) -> Any:
        args, kwargs = map_arg(
            (part.args, part.kwargs),
            lambda n: numbers if n is source else run(n) if n is part.args[0] else values.others[n],
        )
        if part.op == "call_method":
            return getattr(args[0], str(part.target))(*args[1:], **kwargs)
        function: Any = part.target
        return function(*args, **kwargs)

    try:
        return run(node)
    except Exception as error:
        raise CannotScaleError(f"{node.name} cannot be followed: {error}") from error


def _back_through_moved(
    node: Node,
    source: Node,
    channel_map: Tensor,
    values: Values,
    tie: Callable[[Tensor, Tensor], None],
) -> Tensor:
    positions = _positions(node, source, values)
    shape = values.shapes[source]
    if not isinstance(positions, Tensor) or positions.shape != values.shapes[node]:
        raise CannotScaleError(f"{node.name} cannot be followed")
    full = channel_map.expand(positions.shape).flatten()
    found = torch.full((shape.numel(),), -1)
    found[positions.flatten()] = full
    tie(found[positions.flatten()], full)  # an element that was repeated has one scale
    return found.reshape(shape)


def _forward_through_moved(
    node: Node, operand: Node, channel_map: Tensor, values: Values
) -> list[tuple[Node, Tensor]]:
    full = channel_map.expand(values.shapes[operand]).flatten()
    parts = list(node.users) if op_of(node).scale == "split" else [node]
    found = []
    for part in parts:
        if part is not node and op_name(part) != "getitem":
            raise CannotScaleError(f"{part.name} reads the parts of {node.name} in another way")
        positions = _positions(part, operand, values)
        if not isinstance(positions, Tensor):
            raise CannotScaleError(f"{part.name} cannot be followed")
        found.append((part, full[positions.flatten()].reshape(positions.shape)))
    return found
