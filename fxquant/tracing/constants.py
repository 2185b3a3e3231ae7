"""Which values of a graph are known beforehand: parameters, and what is made of them alone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.graph.effects import is_random, writes
from fxquant.graph.layers import tensor_attribute
from fxquant.graph.ops import op_name, op_of


@dataclass(frozen=True)
class Constant:
    """A value that does not depend on the inputs.

    Attributes:
        value: the tensor.
        sources: the nodes of the parameters that it is made of.
        last: the last op on the way, for naming parts of a parameter.
    """

    value: Tensor
    sources: tuple[Node, ...]
    last: Node


class Constants:
    """Finds the constants of one graph.

    Args:
        gm: the graph; its parameters are read when they are asked for.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self._known: dict[Node, Any] = {}
        self._written = {
            id(tensor_attribute(gm, source))
            for node in gm.graph.nodes
            if writes(node)
            for source in node.all_input_nodes
            if source.op == "get_attr"
        }

    def of(self, node: Any) -> Constant | None:
        """The constant tensor that `node` always has, or None."""
        if not isinstance(node, Node):
            return None
        value = self._value(node)
        if not isinstance(value, Tensor):
            return None
        sources = tuple(dict.fromkeys(self._sources(node)))
        return Constant(value, sources, node)

    def _sources(self, node: Node) -> list[Node]:
        if node.op == "get_attr":
            is_parameter = isinstance(tensor_attribute(self.gm, node), nn.Parameter)
            return [node] if is_parameter else []
        return [s for n in node.all_input_nodes if self._value(n) is not None
                for s in self._sources(n)]  # fmt: skip

    def _value(self, node: Node) -> Any:
        if node not in self._known:
            self._known[node] = None  # a cycle cannot be, but a failing op is tried once
            self._known[node] = self._compute(node)
        return self._known[node]

    @torch.no_grad()
    def _compute(self, node: Node) -> Any:
        if node.op == "get_attr":
            value = tensor_attribute(self.gm, node)
            return value if isinstance(value, Tensor) and id(value) not in self._written else None
        if node.op not in ("call_function", "call_method") or not node.args:
            return None
        if writes(node) or is_random(node):
            return None
        source = self._value(node.args[0]) if isinstance(node.args[0], Node) else None
        known = all(self._value(n) is not None for n in node.all_input_nodes)
        if not known:
            # A cast to whatever the input has, and an expansion to its batch, leave the numbers.
            is_neutral = op_of(node).cast or op_name(node) in ("expand", "expand_as")
            return source if is_neutral and isinstance(source, Tensor) else None
        if not node.all_input_nodes:
            return None
        args, kwargs = map_arg((node.args, node.kwargs), self._value)
        try:
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            function: Any = node.target
            return function(*args, **kwargs)
        except Exception:  # whatever an op raises: then it is not known
            return None
