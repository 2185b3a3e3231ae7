"""Running a graph node by node, with values freed after their last use."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxquant.graph.structures import tensors_in

REARRANGEMENTS = frozenset(
    ("view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "unflatten",
     "t", "contiguous", "detach", "numpy_T", "alias")
)  # fmt: skip
VIEWS = REARRANGEMENTS | {
    "expand", "chunk", "split", "slice", "select", "to", "getitem", "unbind"
}  # fmt: skip

Call = tuple[tuple[Any, ...], dict[str, Any]]


def bind_inputs(gm: GraphModule, call: Call) -> dict[str, Any]:
    """The value of each placeholder for one call, defaults included."""
    args, kwargs = call
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    values = {str(n.target): n.args[0] for n in placeholders if n.args}
    values |= dict(zip((str(n.target) for n in placeholders), args, strict=False))
    return values | kwargs


class Stepper:
    """Executes the nodes of one graph in any order that its edges allow.

    Args:
        gm: the graph.
        call: the arguments of one call.
    """

    def __init__(self, gm: GraphModule, call: Call) -> None:
        self.gm = gm
        self.nodes = list(gm.graph.nodes)
        self.inputs = bind_inputs(gm, call)
        self.interpreter = Interpreter(gm, garbage_collect_values=False)
        self.last_use = last_uses(self.nodes)

    @torch.no_grad()
    def compute(self, node: Node, values: dict[Node, Any]) -> Any:
        """The value of `node`, from the values of its arguments."""
        if node.op == "placeholder":
            return self.inputs[str(node.target)]
        self.interpreter.env = values
        return self.interpreter.run_node(node)

    def free(self, values: dict[Node, Any], before: int) -> None:
        """Forget values that no node from position `before` on uses."""
        for node in [n for n in values if self.last_use[n] < before]:
            del values[node]


def last_uses(nodes: list[Node]) -> dict[Node, int]:
    """The position of each node's last user; its own where it has none."""
    position = {node: i for i, node in enumerate(nodes)}
    uses = {n: [position[u] for u in n.users if u in position] for n in nodes}
    return {n: max([*uses[n], position[n]]) for n in nodes}


def deaths(nodes: list[Node]) -> list[list[Node]]:
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


def is_rearrangement(node: Node) -> bool:
    """Whether the op only moves all elements of its first argument."""
    return _op_name(node) in REARRANGEMENTS


def is_view(node: Node) -> bool:
    """Whether the op's result mostly lies in the memory of its first argument."""
    return _op_name(node) in VIEWS


def _op_name(node: Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return str(name).split(".")[0]
