"""Batches in parts of a few rows: results are compared a part at a time and never held whole.

A language model gives a number for each token and each word: the outputs of one batch can be many
times larger than everything else that a run holds.
"""

import math
from collections.abc import Callable, Iterable, Iterator

from torch.fx import GraphModule, Node

from fxquant.graph.calls import Call
from fxquant.graph.shapes import SHAPE
from fxquant.passes.calibrate import accepts

MOST_ELEMENTS = 1 << 24  # of the largest value of a run: 67 MB of float32


def row_parts(gm: GraphModule, calls: Iterable[Call]) -> Iterator[Call]:
    """The calls in parts whose values have at most about `MOST_ELEMENTS` elements.

    A batch of which the graph does not take parts, or that cannot be cut into rows, stays whole; so
    do all batches of a graph that was traced without an example.

    Args:
        gm: a traced model.
        calls: batches.
    """
    growth, taken = _growth(gm), dict[str, bool]()

    def takes(part: Call) -> bool:
        shapes = part.describe()
        if shapes not in taken:
            taken[shapes] = accepts(gm, part)
        return taken[shapes]

    for call in calls:
        rows = max(1, int(MOST_ELEMENTS / growth(call)))
        count = call.row_count
        parts = [call.rows(at, min(at + rows, count)) for at in range(0, count, rows)]
        are_cut = all(part.row_count <= rows for part in parts)
        if len(parts) > 1 and are_cut and takes(parts[0]) and takes(parts[-1]):
            yield from parts
        else:
            yield call


def takes(gm: GraphModule, call: Call) -> bool:
    """Whether the graph runs on a call; of a large one, on its first part."""
    return accepts(gm, next(row_parts(gm, [call])))


def leading_rows(calls: Iterable[Call], count: int) -> Iterator[Call]:
    """The first `count` rows of all batches; a batch that cannot be cut stays whole."""
    for call in calls:
        if count <= 0:
            return
        part = call.rows(0, min(count, call.row_count))
        count -= part.row_count
        yield part


def _growth(gm: GraphModule) -> Callable[[Call], float]:
    """How many elements the largest value has for each row of a call, from the recorded shapes."""
    inputs = [n.meta[SHAPE] for n in gm.graph.nodes if n.op == "placeholder" and SHAPE in n.meta]
    example = math.prod(inputs[0]) if inputs else 0
    largest = max((_elements(n) for n in gm.graph.nodes), default=0)

    def of(call: Call) -> float:
        first = next(iter(call.tensors()), None)
        if first is None or not example or not first.numel():
            return 1.0
        return max(1.0, largest / example * first.numel() / max(call.row_count, 1))

    return of


def _elements(node: Node) -> int:
    return math.prod(node.meta[SHAPE]) if SHAPE in node.meta and node.op != "get_attr" else 0
