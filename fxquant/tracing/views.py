"""Views of an exported program, written so that they hold for more inputs than its example.

before: `x.as_strided(size, stride)`; after: `strided_view(x, size, stride, order)`, as in files
before: `x[:, :-n]`; after: `x[:, : x.shape[1] - n]`, also for n = 0
before: `x.view(count, -1)`; after: `x.view(count, 64)`, also for a count of 0
before: `nonzero_numpy(x)`; after: `nonzero(x, as_tuple=True)`, as in files
"""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxquant.graph.strided_view import strided_view
from fxquant.tracing.known_values import in_example

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default)


def write_view(graph: Graph, node: Node, copied: Node) -> None:
    """Change the copy of an op that is a view, or makes indices of one.

    Args:
        graph: has the copy.
        node: of the exported program.
        copied: its copy.
    """
    if copied.target is aten.as_strided.default and len(copied.args) == 3:
        order = _order_in_memory(node.args[0].meta["val"])  # type: ignore[union-attr]
        if order is not None:
            copied.target, copied.args = strided_view, (*copied.args, order)
    elif copied.target is aten.slice.Tensor:
        _count_from_the_start(graph, node, copied)
    elif copied.target is aten.nonzero_numpy.default:
        copied.target, copied.kwargs = torch.nonzero, {"as_tuple": True}
    elif copied.target in _VIEWS:
        copied.args = (copied.args[0], _view_of_any_count(node, copied.args[1]))


def _count_from_the_start(graph: Graph, node: Node, copied: Node) -> None:
    """`x[:, :-n]` as `x[:, : size - n]`, which is all of `x` for n = 0.

    That is what the other way gives after `if n > 0: x = x[:, :-n]`.
    """
    if len(node.args) < 4 or not isinstance(node.args[3], Node):
        return
    end = in_example(node.args[3].meta["val"])
    if end is not None and end < 0:
        source, dimension, start, stop, *step = copied.args
        with graph.inserting_before(copied):
            size = graph.call_function(aten.sym_size.int, (source, dimension))
            stop = graph.call_function(operator.add, (size, stop))
        copied.args = (source, dimension, start, stop, *step)


def _view_of_any_count(node: Node, size: Any) -> Any:
    """The size that a view asks for, such that it may ask for no rows at all.

    `view(n, -1)` is ambiguous for n = 0. Where n is a number of values (of tokens that a mask
    picks) which may be none, what -1 stands for is written out.
    """
    shape = node.meta["val"].shape
    counts = [n for n in shape if isinstance(n, torch.SymInt) and not n.node.has_hint()]
    if -1 not in size or not counts:
        return size
    return [int(n) if a == -1 and type(n) is int else a for a, n in zip(size, shape, strict=True)]


def _order_in_memory(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions of an exported tensor as they lie in memory, the outermost first."""
    strides = [in_example(stride) for stride in tensor.stride()]
    known = [stride for stride in strides if stride is not None]
    if len(known) < len(strides):
        return None
    return tuple(sorted(range(tensor.ndim), key=lambda d: -known[d]))
