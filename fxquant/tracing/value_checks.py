"""Which checks of values a graph needs: tried on the model itself, as those of sizes are.

An export with known values goes the way of its example at every branch, and each branch is a check
(`expect_values`). While a graph is compared with the model the checks only note that they broke.

- Where one broke and the results are still the model's, again and again, both ways compute the
  same for such inputs: the check is not needed, and the graph is for both. So it is where an
  example has tokens with global attention and a call without any goes through empty tensors.
- Where the results differ, the graph is for one way, and an input of the other kind is known.
- A check that no call breaks stays: the graph refuses what would break it, in words.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.calls import Call
from fxquant.graph.effects import writes
from fxquant.graph.layers import is_layer
from fxquant.graph.parameters import memory_of
from fxquant.graph.structures import expect_values
from fxquant.tracing.known_values import BRANCH
from fxquant.tracing.oracle import Oracle
from fxquant.tracing.other_values import other_values

_FEWEST_AGREED = 2  # calls on which both ways agree, from which that is no accident


class ValueChecks:
    """The checks of values in a graph, which only note that they broke until they are settled.

    Args:
        gm: is changed.

    Attributes:
        turned: calls that the model takes and that go a way which the graph does not have, each
            with what is special about it.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.nodes = [n for n in gm.graph.nodes if n.target is expect_values]
        self.turned: list[tuple[str, Call]] = []
        self._broken: set[int] = set()  # in the call that runs
        self._agreed: Counter[int] = Counter()  # calls that broke a check and agreed
        for number, node in enumerate(self.nodes):
            node.target, node.args = self._note, (*node.args, number)
        gm.recompile()

    def _note(self, holds: object, where: str, code: str, number: int) -> None:
        if not holds:
            self._broken.add(number)

    def try_others(self, oracle: Oracle, call: Call, compared: Sequence[int]) -> str | None:
        """How the graph differs from the model at other values, or what it refuses; or None.

        Args:
            oracle: asks the model. The graph agrees with it at all sizes that it takes.
            call: whose values are changed.
            compared: numbers with which the model compares values.
        """
        refused: dict[int, str] = {}
        for answer in oracle.answers:
            self._broken.clear()
            if oracle.compare(self.gm, answer) == (None, None):
                self._agreed.update(self._broken)
                refused = dict.fromkeys(self._broken, answer.label) | refused
        for label, other, is_various in other_values(call, compared):
            asked = oracle.ask(other, label)
            if asked is None:
                continue
            self._broken.clear()
            wrong, refusal = oracle.compare(self.gm, asked)
            if wrong is None and refusal is None:
                self._agreed.update(self._broken if is_various else ())
                refused = dict.fromkeys(self._broken, label) | refused
            elif self._broken:
                self.turned.append((label, other))
            else:
                return f"at {label}: {wrong or refusal}"
        if self.turned:
            return f"{self.turned[0][0]} takes another way"
        for number, label in refused.items():
            if not self._is_unneeded(number):
                return f"{label} may take another way"
        return None

    def _is_unneeded(self, number: int) -> bool:
        """Whether calls of both answers agree; a truth is checked as a number of 0 or 1, thrice."""
        truth = _truth_of(self.nodes[number])
        same = [i for i, n in enumerate(self.nodes) if truth is not None and _truth_of(n) is truth]
        return max(self._agreed[i] for i in (number, *same)) >= _FEWEST_AGREED

    def settle(self) -> list[str]:
        """Take out the checks that are not needed; the others refuse from now on.

        Returns:
            Places in the model's code at which other values than any that were tried would go a way
            that the graph refuses.
        """
        places: dict[str, None] = {}
        unneeded = [node for i, node in enumerate(self.nodes) if self._is_unneeded(i)]
        for node in self.nodes:
            if node in unneeded:
                _erase(node)
                continue
            node.target, node.args = expect_values, node.args[:-1]
            if BRANCH in node.meta:
                places[node.meta[BRANCH]] = None
        self.gm.recompile()
        return list(places)


def _truth_of(check: Node) -> Node | None:
    """The truth that is checked: `expect_values(sym_ite(truth, 1, 0) == 1)`."""
    compared: Any = check.args[0]
    number = compared.args[0] if isinstance(compared, Node) and compared.args else None
    if not isinstance(number, Node) or number.target is not torch.sym_ite:
        return None
    return number.args[0] if number.args[1:] == (1, 0) else None  # type: ignore[return-value]


def _erase(node: Node) -> None:
    """Take a node out, and what was computed for it alone."""
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        if not source.users and source.op == "call_function" and not writes(source):
            _erase(source)


def layer_without_node(gm: GraphModule, prepared: nn.Module) -> str | None:
    """Which layer a graph of one way lost: the model has it for inputs that go the other way."""
    held = {memory_of(parameter) for parameter in gm.parameters()}
    for name, module in prepared.named_modules():
        own = [memory_of(parameter) for parameter in module.parameters(recurse=False)]
        if is_layer(module) and own and not held.intersection(own):
            return f"layer {name} runs only there"
    return None
