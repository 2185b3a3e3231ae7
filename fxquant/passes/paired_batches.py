"""Batches on their way through the float and the quantized graph, side by side.

Each batch goes from one turn to the next on its own: between two turns there are the values of one
batch, and at a turn only those that later nodes use. The float graph waits for no layer: from a
turn it can run ahead to where its values are fewer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.graph.calls import Call
from fxquant.graph.layers import layer_arguments
from fxquant.graph.stepper import Stepper
from fxquant.passes.calibrate import naming_batch
from fxquant.passes.held_values import HeldValues
from fxquant.passes.padding import fitting_mask, padding_mask


@dataclass
class PairedBatch:
    """One batch in both graphs, whose nodes are the same.

    Attributes:
        index: its number.
        is_held_out: whether it chooses nothing.
        clean: through the float graph.
        noisy: through the quantized graph.
        clean_values: of the float graph's nodes that are still needed.
        noisy_values: of the quantized graph's.
        position: the first node of the quantized graph that has not run.
        clean_position: the same of the float graph.
        padding: booleans [rows, tokens], False where a token is padding; None: none is known.
    """

    index: int
    is_held_out: bool
    clean: Stepper
    noisy: Stepper
    clean_values: dict[Node, Any] = field(default_factory=dict)
    noisy_values: dict[Node, Any] = field(default_factory=dict)
    position: int = 0
    clean_position: int = 0
    padding: Tensor | None = None

    @classmethod
    def of(
        cls,
        models: tuple[GraphModule, GraphModule],
        calls: tuple[Callable[[], Call], Callable[[], Call]],
        index: int,
        held_out: bool,
    ) -> "PairedBatch":
        """A batch before the first node.

        Args:
            models: the float graph and the quantized one.
            calls: give the batch for each of them.
            index: its number.
            held_out: whether it chooses nothing.
        """
        clean, noisy = map(Stepper, models, calls)
        return cls(index, held_out, clean, noisy)

    def advance(self, position: int) -> None:
        """Let both graphs run up to before the node at `position`.

        Raises:
            CalibrationError: a graph does not take the batch.
        """
        if self.position == 0:
            self.padding = padding_mask(self.clean.call)
        self.run_ahead(position)
        with naming_batch(self.clean.gm, lambda: self.clean.call, self.index):
            self.noisy.advance(self.noisy_values, self.position, position)
        self.position = max(position, self.position)

    def run_ahead(self, position: int) -> None:
        """Let the float graph alone run up to before the node at `position`.

        Raises:
            CalibrationError: it does not take the batch.
        """
        with naming_batch(self.clean.gm, lambda: self.clean.call, self.index):
            self.clean.advance(self.clean_values, self.clean_position, position)
        self.clean_position = max(position, self.clean_position)

    def forget(self) -> None:
        """No node runs any more, and no value is needed."""
        self.clean_values, self.noisy_values = {}, {}

    @contextmanager
    def resumed(self, held: HeldValues) -> Iterator[None]:
        """Its values are here inside, and among the held ones after it."""
        self.clean_values, self.noisy_values = held.take(self.index) or ({}, {})
        try:
            yield
        finally:
            held.put(self.index, [self.clean_values, self.noisy_values])
            self.clean_values, self.noisy_values = {}, {}

    def values_of(self, node: Node | None) -> tuple[Tensor, Tensor] | None:
        """The tensor in the float graph, and in the quantized one, of a node of the latter."""
        if node is None or node not in self.noisy_values:
            return None
        clean = self.clean_values.get(self.partner(node))
        noisy = self.noisy_values[node]
        if not isinstance(clean, Tensor) or not isinstance(noisy, Tensor):
            return None
        return clean, noisy

    def arguments(self, node: Node) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
        """The arguments of a layer that `node` calls, in the float graph and in the quantized one.

        None where the graphs do not show what it reads.
        """
        partner = self.partner(node)
        clean = map_arg((partner.args, partner.kwargs), self.clean_values.get)
        noisy = map_arg((node.args, node.kwargs), self.noisy_values.get)
        found = [layer_arguments(args, kwargs) for args, kwargs in (clean, noisy)]
        if not all(isinstance(arguments[0], Tensor) for arguments in found):
            return None
        return found[0], found[1]

    def partner(self, node: Node) -> Node:
        """The node of the float graph for one of the quantized graph."""
        return self.clean.nodes[self.noisy.position[node]]

    def mask_for(self, x: Tensor) -> Tensor | None:
        """Which tokens of `x` [..., channels] count; None: all."""
        return fitting_mask(self.padding, x)


def difference(clean: Tensor | None, noisy: Tensor) -> Tensor | None:
    """`clean` − `noisy` in float32, where there are two of the same shape."""
    if clean is None or clean.shape != noisy.shape:
        return None
    return clean.float() - noisy.float()
