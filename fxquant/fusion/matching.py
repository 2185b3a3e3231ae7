"""Whether a node computes a formula: a tree of ops, values and numbers.

>>> x = Value("x")
>>> half = Formula("mul", x, 0.5)
"""

import math
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fxquant.graph.ops import op_name

COMMUTES = ("add", "mul")


@dataclass(frozen=True)
class Value:
    """Any node; the same one wherever the name stands."""

    name: str


@dataclass(frozen=True)
class Given:
    """Any argument: a number, a dtype, or a node that gives one."""

    name: str


@dataclass(frozen=True, init=False)
class Formula:
    """An op, by its short name, on arguments: formulas, values, any arguments or given numbers."""

    op: str
    arguments: tuple[Any, ...]

    def __init__(self, op: str, *arguments: Any) -> None:
        object.__setattr__(self, "op", op)
        object.__setattr__(self, "arguments", arguments)


def match(node: Node, formula: Formula) -> dict[str, Any] | None:
    """What the names of a formula stand for if `node` computes it, else None.

    Nobody else may read what is computed in between.
    """
    found: dict[str, Any] = {}
    return found if _is(node, formula, found) else None


def _is(given: Any, wanted: Any, found: dict[str, Any]) -> bool:
    if isinstance(wanted, Value):
        return isinstance(given, Node) and found.setdefault(wanted.name, given) is given
    if isinstance(wanted, Given):
        return found.setdefault(wanted.name, given) is given
    if not isinstance(wanted, Formula):
        return _is_equal(given, wanted)
    if not isinstance(given, Node) or op_name(given) != wanted.op:
        return False
    arguments = (*given.args, *given.kwargs.values())
    if len(arguments) != len(wanted.arguments) or "out" in given.kwargs:
        return False
    orders = [arguments]
    if wanted.op in COMMUTES:
        orders.append(arguments[::-1])
    for order in orders:
        trial = dict(found)
        if all(_is_inside(g, w, trial) for g, w in zip(order, wanted.arguments, strict=True)):
            found.update(trial)
            return True
    return False


def _is_inside(given: Any, wanted: Any, found: dict[str, Any]) -> bool:
    if isinstance(wanted, Formula) and isinstance(given, Node) and len(given.users) != 1:
        return False
    return _is(given, wanted, found)


def _is_equal(given: Any, wanted: Any) -> bool:
    """Whether a literal is the one that is wanted; constants may be rounded differently."""
    if isinstance(given, list | tuple) and len(given) == 1:
        given = given[0]  # one dimension, or a list of one
    if isinstance(given, Node) or type(given) is bool or type(wanted) is bool:
        return given is wanted
    if isinstance(given, int | float) and isinstance(wanted, int | float):
        return math.isclose(given, wanted, rel_tol=1e-6)
    return bool(given == wanted)
