"""`loop`: a Python loop over a size, as one node of a graph.

The body of the loop is plain data, so that it can be in a file like any other argument:

    body = (steps, carried, collected)

- `steps`: one `(function, args, kwargs)` for each op, in order. `function` is a name such as
  `"aten::select.int"` or `"_operator.add"`; `kwargs` is a tuple of `(name, value)`
- `carried`: what each carried value is in the next round
- `collected`: what is kept of every round

In place of a value there may be a reference: `("step", i)` is the result of a step of this round,
`("carried", i)` a value that the round before left (in the first round: the initial one),
`("outer", i)` a value from outside, the same in all rounds, `("index", a, b)` is the number
`a + b * round`, and `("offset", i, b)` is `outer i + b * round`.
"""

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fxquant.errors import LoadError, ShapeError
from fxquant.graph.saved_ops import fault_of_call, saved_functions, saved_overload, written
from fxquant.graph.structures import graph_function

REFERENCES = ("step", "carried", "outer", "index", "offset")


@graph_function
def loop(
    body: tuple[Any, ...], count: int, carried: tuple[Any, ...], outer: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Run the body `count` times.

    Args:
        body: what a round does; see the head of this file.
        count: the number of rounds, at least 1.
        carried: the initial carried values; None for one that the first round does not read.
        outer: values that every round may read, or write into.

    Returns:
        The carried values after the last round, then for each collected value the list of what it
        was in the rounds.

    Raises:
        ShapeError: there is no round.
        LoadError: the body is none that a graph may hold.
    """
    if count < 1:
        raise ShapeError(
            "loop",
            found=f"{count} rounds",
            needed="at least one",
            remedy="Pass inputs that are not empty.",
        )
    run = _compiled(_Body(body))
    lists: tuple[list[Any], ...] = tuple([] for _ in body[2])
    for number in range(count):
        carried, collected = run(number, carried, outer)
        for kept, value in zip(lists, collected, strict=True):
            kept.append(value)
    return (*carried, *lists)


def fault_of_loop(args: tuple[Any, ...]) -> str | None:
    """What is wrong with the arguments of `loop` in a file, or None."""
    body, _, carried, outer = args
    try:
        _compiled(_Body(body))
        counts = {"carried": len(carried), "outer": len(outer)}
        fits = len(body[1]) == len(carried) and all(
            number < counts[kind] for kind, number in _slots(body)
        )
    except LoadError as error:
        return str(error)
    except Exception as error:  # a damaged file may hold anything
        return f"a body of a loop that cannot be read: {error}"
    return None if fits else "a body of a loop that reads values it is not given"


# A file is not trusted, and here a node holds calls of its own.
loop.fault_of = fault_of_loop  # type: ignore[attr-defined]


def name_of_function(target: Any) -> str | None:
    """What a body calls a function, or None where a body may not call it."""
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target._schema.name}.{target._schema.overload_name or 'default'}"
        return name if _function(name) is target else None
    return next((n for n, known in saved_functions().items() if known is target), None)


def calls_of(node: Node) -> list[Node]:
    """The calls that one round of a node that calls `loop` makes, as nodes of a graph."""
    body: Any = node.args[0]
    graph = _graph_of(body)
    return [n for n in graph.nodes if n.op == "call_function"]


def _function(name: str) -> Any:
    space, _, rest = name.partition("::")
    if space == "aten":
        packet, _, overload = rest.partition(".")
        return saved_overload(packet, overload)
    return saved_functions().get(name)


def _slots(part: Any) -> list[tuple[str, int]]:
    """The carried and outer values that a body, or a part of one, reads."""
    if not isinstance(part, tuple | list):
        return []
    if part and part[0] in ("carried", "outer", "offset"):
        return [("carried" if part[0] == "carried" else "outer", part[1])]
    return [slot for inner in part for slot in _slots(inner)]


class _Body:
    """A body as a key: 1, 1.0 and True are equal numbers but other arguments."""

    def __init__(self, data: tuple[Any, ...]) -> None:
        self.data, self.text = data, repr(data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Body) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=256)
def _compiled(body: _Body) -> Callable[..., Any]:
    """The body as a function `(round, carried, outer) -> (carried, collected)`."""
    return GraphModule({}, _graph_of(body.data))


def _graph_of(body: tuple[Any, ...]) -> Graph:
    """The graph of one round, of calls that a graph in a file may make."""
    steps, next_carried, collected = body
    graph = Graph()
    number = graph.placeholder("number")
    given = {"carried": graph.placeholder("carried"), "outer": graph.placeholder("outer")}
    results: list[Node] = []

    def value_of(part: Any) -> Any:
        if isinstance(part, tuple | list):
            if part and part[0] in REFERENCES:
                return referred(*part)
            return tuple(map(value_of, part))
        return part

    def referred(kind: str, *numbers: int) -> Node:
        if kind == "step":
            return results[numbers[0]]
        if kind in ("index", "offset"):
            first, step = numbers
            start = first if kind == "index" else referred("outer", first)
            scaled = graph.call_function(operator.mul, (number, step))
            return graph.call_function(operator.add, (start, scaled))
        return graph.call_function(operator.getitem, (given[kind], numbers[0]))

    for name, args, kwargs in steps:
        function = _function(str(name))
        if function is None:
            _refuse(f"the function {name!r:.200}")
        arguments = {str(key): value_of(value) for key, value in kwargs}
        function, arguments = written(function, arguments)
        results.append(graph.call_function(function, value_of(args), arguments))
        fault = fault_of_call(results[-1])
        if fault is not None:
            _refuse(fault)
    graph.output((value_of(next_carried), value_of(collected)))
    return graph


def _refuse(fault: str) -> None:
    raise LoadError(
        "the body of a loop",
        found=fault,
        needed="functions on tensors that a saved graph may call",
        remedy="Save the model again with this version of fxquant.",
    )
