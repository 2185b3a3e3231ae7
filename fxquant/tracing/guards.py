"""What `torch.export` assumed about input shapes, written into the graph as checks.

A guard is Python text over inputs and their sizes, such as `L['x'].size()[1] <= 64`. Left out, a
graph would compute the wrong branch for other shapes and say nothing.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.And: operator.and_,
    ast.Or: operator.or_,
    ast.Not: operator.not_,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": torch.sym_min, "max": torch.sym_max}


class UnknownGuardError(Exception):
    """A guard has a form that this module does not know."""


def insert_guards(graph: Graph, guards: list[str], inputs: dict[str, Any], before: Node) -> None:
    """Insert a `torch._assert` for each guard in front of node `before`.

    Args:
        graph: the graph under construction.
        guards: Python expressions over `L['name']`.
        inputs: the node of each input by name.
        before: where the checks go.

    Raises:
        UnknownGuardError: an expression has an unknown form.
    """
    sizes: dict[tuple[Node, int], Node] = {}
    with graph.inserting_before(before):
        for guard in guards:
            condition = _build(graph, ast.parse(guard, mode="eval").body, inputs, sizes)
            readable = guard.replace("L['", "").replace("']", "")
            message = f"the graph holds for inputs with {readable}; trace again with such inputs"
            if isinstance(condition, Node):
                graph.call_function(torch._assert, (condition, message))
            elif not condition:
                raise UnknownGuardError(guard)


def _build(
    graph: Graph, tree: ast.AST, inputs: dict[str, Any], sizes: dict[tuple[Node, int], Node]
) -> Any:
    def build(part: ast.AST) -> Any:
        return _build(graph, part, inputs, sizes)

    def apply(kind: ast.AST, *operands: Any) -> Any:
        function = _OPERATORS.get(type(kind))
        if function is None:
            raise UnknownGuardError(ast.unparse(tree))
        if any(isinstance(x, Node) for x in operands):
            return graph.call_function(function, operands)
        return function(*operands)

    match tree:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=kind, operand=operand):
            return apply(kind, build(operand))
        case ast.BinOp(left=left, op=kind, right=right):
            return apply(kind, build(left), build(right))
        case ast.BoolOp(op=kind, values=[first, *rest]):
            result = build(first)
            for part in rest:
                result = apply(kind, result, build(part))
            return result
        case ast.Compare(left=left, ops=[kind], comparators=[right]):
            return apply(kind, build(left), build(right))
        case ast.Compare(left=left, ops=[first, second], comparators=[middle, right]):
            between = build(middle)
            below = apply(first, build(left), between)
            return apply(ast.And(), below, apply(second, between, build(right)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return graph.call_function(_FUNCTIONS[name], tuple(map(build, arguments)))
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=source, attr="size"), args=[]),
            slice=ast.Constant(value=int(dim)),
        ):
            node = build(source)
            if (node, dim) not in sizes:
                sizes[node, dim] = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
            return sizes[node, dim]
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value=str(name))):
            return inputs[name]
        case ast.Subscript(value=source, slice=ast.Constant(value=str(key) | int(key))):
            container = build(source)
            if isinstance(container, Node):
                return graph.call_function(operator.getitem, (container, key))
            return container[key]
    raise UnknownGuardError(ast.unparse(tree))
