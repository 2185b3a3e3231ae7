"""Conditions on the sizes of inputs under which an exported graph is right.

A guard is Python text over inputs and their sizes, such as `L['x'].size()[1] <= 64`, that
`torch.export` writes. Many are needed: for other sizes the graph would compute the wrong branch and
say nothing. Many are not: they only note how memory was laid out. Which is which is tried on the
model itself (see `trace.py`); those that are needed become checks in the graph.
"""

import ast
import operator
import re
from collections.abc import Callable
from functools import lru_cache, reduce
from types import CodeType
from typing import Any

import torch
from torch.fx import Graph, Node

from fxquant.graph.structures import expect_shape

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
_SIZE = re.compile(r"L(?:\['\w+'\]|\[\d+\])+\.size\(\)\[\d+\]")


def holds(guard: str, values: dict[str, Any]) -> bool | None:
    """Whether a guard of torch's is true for these arguments; None where it cannot be told."""
    try:
        space = {"__builtins__": {}, "L": values, "min": min, "max": max, "torch": torch}
        return bool(eval(_compiled(guard), space))
    except Exception:  # a helper of torch's that is not known here
        return None


@lru_cache(maxsize=4096)
def _compiled(guard: str) -> CodeType:
    """A guard is tried at hundreds of sizes. Its text comes from torch.export, not from a file."""
    return compile(guard, "<guard>", "eval")


def is_about_sizes(guard: str) -> bool:
    """Whether the guard is one that `insert_guards` can write."""
    try:
        _build(Graph(), ast.parse(guard, mode="eval").body, None, {})
    except _UnknownGuardError:
        return False
    return True


def insert_guards(graph: Graph, guards: list[str]) -> None:
    """Check the guards at the start of the graph, each with an error in plain words."""
    inputs = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
    first = next(n for n in graph.nodes if n.op != "placeholder")
    sizes: dict[tuple[Any, int], Node] = {}
    with graph.inserting_before(first):
        for guard in guards:
            condition = _build(graph, ast.parse(guard, mode="eval").body, inputs, sizes)
            if isinstance(condition, Node):
                found = list(dict.fromkeys(_SIZE.findall(guard)))
                nodes = [
                    _build(graph, ast.parse(s, mode="eval").body, inputs, sizes) for s in found
                ]
                graph.call_function(expect_shape, (condition, _in_words(guard, found), *nodes))


def _in_words(guard: str, sizes: list[str]) -> str:
    """What is found (with a `{}` for each size), `|`, and what the graph was traced for."""
    meanings = {0: "batch size {}", 1: "length {}"}
    parts = []
    for size in sizes:
        source, _, last = size.rpartition(".size()[")
        dimension = int(last.rstrip("]"))
        meaning = meanings.get(dimension, f"size {{}} of dimension {dimension}")
        parts.append(f"{meaning} of {_plain(source)}")
    limit = _limit(guard, sizes)
    needed = f"{limit}, for which it was traced ({_plain(guard)})"
    return f"{', '.join(parts) or 'sizes'}|{needed}"


def _plain(guard: str) -> str:
    return guard.replace("L['", "").replace("']", "")


def _limit(guard: str, sizes: list[str]) -> str:
    """A bound of a single size in words, where the guard is one."""
    if len(sizes) == 1:
        size = re.escape(sizes[0])
        simple = re.fullmatch(rf"{size} (<=|>=|<|>|==|!=) (-?\d+)", guard)
        negative = re.fullmatch(rf"\(?-1\)?\*{size} (<=|>=|<|>|==|!=) (-?\d+)", guard)
        if simple or negative:
            sign, number = (simple or negative).groups()  # type: ignore[union-attr]
            value = int(number)
            if negative:
                mirrored = {"<=": ">=", ">=": "<=", "<": ">", ">": "<"}
                sign, value = mirrored.get(sign, sign), -value
            return {
                "<=": f"sizes of {value} and less", "<": f"sizes of {value - 1} and less",
                ">=": f"sizes of {value} and more", ">": f"sizes of {value + 1} and more",
                "==": f"a size of {value}", "!=": f"sizes other than {value}",
            }[sign]  # fmt: skip
    return "sizes that fit each other"


class _UnknownGuardError(Exception):
    """A guard has a form that this module does not know."""


def _build(graph: Graph, tree: ast.AST, inputs: dict[str, Any] | None, sizes: Any) -> Any:
    """The nodes of an expression; with `inputs` None, only whether its form is known."""

    def build(part: ast.AST) -> Any:
        return _build(graph, part, inputs, sizes)

    def apply(kind: ast.AST, *operands: Any) -> Any:
        function = _OPERATORS.get(type(kind))
        if function is None:
            raise _UnknownGuardError(ast.unparse(tree))
        if any(isinstance(x, Node) for x in operands):
            return graph.call_function(function, operands)
        return 1 if inputs is None else function(*operands)

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
            operands = list(map(build, arguments))
            if inputs is None:
                return 1
            return reduce(lambda a, b: graph.call_function(_FUNCTIONS[name], (a, b)), operands)
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=source, attr="size"), args=[]),
            slice=ast.Constant(value=int(dim)),
        ):
            node = build(source)
            if inputs is None:
                return 1
            if (node, dim) not in sizes:
                sizes[node, dim] = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
            return sizes[node, dim]
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value=str(name))):
            return 1 if inputs is None else inputs[name]
        case ast.Subscript(value=source, slice=ast.Constant(value=str(key) | int(key))):
            container = build(source)
            if isinstance(container, Node):
                return graph.call_function(operator.getitem, (container, key))
            return 1 if inputs is None else container[key]
    raise _UnknownGuardError(ast.unparse(tree))
