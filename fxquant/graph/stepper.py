"""Running a graph node by node, with values freed after their last use.

Each node runs once and in order on values of its own call, so what a node writes in place is seen
by the nodes behind it, as in the model, and by nobody else.
"""

import math
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.calls import Call
from fxquant.graph.effects import is_foreign, is_random
from fxquant.graph.interpreter import GraphInterpreter
from fxquant.graph.left_alone import left_alone
from fxquant.graph.shapes import SHAPE, input_values
from fxquant.graph.structures import tensors_in


class Stepper:
    """Executes the nodes of one graph in any order that its edges allow.

    Args:
        gm: the graph.
        call: the arguments of one call, or what gives them when the first of them is needed.
    """

    def __init__(self, gm: GraphModule, call: Call | Callable[[], Call]) -> None:
        self.gm, self._call = gm, call
        self.nodes = list(gm.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self._inputs: dict[str, Any] = {}
        self.interpreter = GraphInterpreter(gm, garbage_collect_values=False)
        self.last_use = last_uses(self.nodes)
        self.opaque = {
            n: module
            for n in self.nodes
            if n.op == "call_module" and is_foreign(module := gm.get_submodule(str(n.target)))
        }
        self.drawing = {n: i for i, n in enumerate(self.nodes) if is_random(n) or n in self.opaque}

    @property
    def call(self) -> Call:
        """The arguments."""
        return self._call if isinstance(self._call, Call) else self._call()

    @torch.no_grad()
    def compute(self, node: Node, values: dict[Node, Any]) -> Any:
        """The value of `node`, from the values of its arguments.

        What draws random numbers draws the same at the same place of another run.
        """
        if node.op == "placeholder":
            return self._input(node.name)
        if node in self.drawing:
            torch.manual_seed(self.drawing[node])
        self.interpreter.env = values
        try:
            if node in self.opaque:  # batches that take turns must not see each other's state
                with left_alone(self.opaque[node]):
                    return self.interpreter.run_node(node)
            return self.interpreter.run_node(node)
        finally:
            self.interpreter.env = {}  # values that wait elsewhere must not stay here too

    def _input(self, name: str) -> Any:
        """The value of a placeholder, which is held by nobody else once it has been taken."""
        if name not in self._inputs:
            own = self.call.clone()  # the graph may write into its inputs
            names = [n.name for n in self.nodes if n.op == "placeholder"]
            self._inputs = dict(zip(names, input_values(self.gm, own), strict=True))
        return self._inputs.pop(name)

    def advance(self, values: dict[Node, Any], start: int, stop: int) -> None:
        """Compute the nodes from position `start` to before `stop`, and forget what is done with.

        Args:
            values: of the nodes before `start` that later ones use; changed in place.
            start: where the run stands.
            stop: where it goes to.
        """
        for position in range(start, stop):
            node = self.nodes[position]
            values[node] = self.compute(node, values)
            self.free(values, position + 1)

    def free(self, values: dict[Node, Any], before: int) -> None:
        """Forget values that no node from position `before` on uses."""
        for node in [n for n in values if self.last_use[n] < before]:
            del values[node]


def last_uses(nodes: list[Node]) -> dict[Node, int]:
    """The position of each node's last user; its own where it has none."""
    position = {node: i for i, node in enumerate(nodes)}
    uses = {n: [position[u] for u in n.users if u in position] for n in nodes}
    return {n: max([*uses[n], position[n]]) for n in nodes}


def narrowest_place(gm: GraphModule, start: int, stop: int) -> int:
    """The first position from `start` to `stop` at which the values that wait have fewest elements.

    Args:
        gm: a graph whose shapes are recorded; what has none does not count.
        start: the first position.
        stop: the last.
    """
    nodes = list(gm.graph.nodes)
    change = [0] * (len(nodes) + 1)
    for place, (node, last) in enumerate(last_uses(nodes).items()):
        if node.op != "get_attr":
            elements = math.prod(node.meta.get(SHAPE, (0,)))
            change[place + 1] += elements
            change[last + 1] -= elements
    waiting = list(accumulate(change))
    return min(range(start, stop + 1), key=waiting.__getitem__)


def last_used_at(nodes: list[Node]) -> list[list[Node]]:
    """For each position, the nodes whose last user runs there; the last node never dies."""
    dying: list[list[Node]] = [[] for _ in nodes]
    for node, last in last_uses(nodes).items():
        if node is not nodes[-1]:
            dying[last].append(node)
    return dying


def held_bytes(values: Iterable[Any]) -> int:
    """Bytes of the distinct memory behind the tensors among `values`."""
    return HeldBytes(values).peak


class HeldBytes:
    """Counts the distinct memory behind values, and the most there ever was.

    Args:
        values: what is held from the start.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        self._users: dict[int, int] = {}
        self._bytes = self.peak = 0
        for value in values:
            self.add(value)

    def add(self, value: Any) -> None:
        """A value is held from now on."""
        for tensor in tensors_in(value):
            storage = tensor.untyped_storage()
            users = self._users.get(storage.data_ptr(), 0)
            self._users[storage.data_ptr()] = users + 1
            self._bytes += 0 if users else storage.nbytes()
        self.peak = max(self.peak, self._bytes)

    def remove(self, value: Any) -> None:
        """A value is held no more."""
        for tensor in tensors_in(value):
            storage = tensor.untyped_storage()
            self._users[storage.data_ptr()] -= 1
            if not self._users[storage.data_ptr()]:
                self._bytes -= storage.nbytes()


def is_tensor(value: Any) -> bool:
    """Whether `value` is a floating tensor, the kind that can be compared."""
    return isinstance(value, Tensor) and value.is_floating_point()
