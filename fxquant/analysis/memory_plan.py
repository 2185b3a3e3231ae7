"""How much memory a sensitivity run will need, from shapes and liveness."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxquant.analysis.candidates import Candidate
from fxquant.analysis.exact import dependents
from fxquant.graph.ops import is_view
from fxquant.graph.shapes import DTYPE, SHAPE
from fxquant.graph.stepper import last_uses
from fxquant.modules.weight_forms import matrix_of


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes.

    Attributes:
        activations: the most bytes of activations held at once.
        weights: bytes of the largest candidate's weight, for its quantized copies.
    """

    activations: int
    weights: int

    @property
    def peak(self) -> int:
        """Both together."""
        return self.activations + self.weights

    def __str__(self) -> str:
        return (
            f"memory plan: {self.activations / 1e6:.1f} MB of activations and "
            f"{self.weights / 1e6:.1f} MB for the layer under test"
        )


def plan_exact(gm: GraphModule, candidates: Sequence[Candidate], rows: int) -> MemoryPlan:
    """Predict what `measure_exact` holds for batches of `rows` rows.

    Args:
        gm: a graph whose shapes were recorded when it was traced.
        candidates: the layers to try.
        rows: the first dimension of a batch.
    """
    nodes = list(gm.graph.nodes)
    size = {node: node_bytes(node) for node in nodes}
    traced = next((n.meta[SHAPE][0] for n in nodes if n.meta.get(SHAPE)), rows)
    last = last_uses(nodes)
    peak = 0
    alive = set(nodes)
    for candidate in candidates:
        rerun = dependents(nodes, candidate.roots)
        start = nodes.index(rerun[0])
        alive = {n for n in alive if last[n] >= start}
        peak = max(peak, sum(size[n] for n in alive) + _suffix_peak(rerun, size))
    largest = max((matrix_of(c.layer).numel() * 4 for c in candidates), default=0)
    return MemoryPlan(round(peak / max(traced, 1)) * rows, largest)


def node_bytes(node: Node) -> int:
    """Bytes of the node's own memory; a view of another node has none."""
    shape = node.meta.get(SHAPE)
    if shape is None or is_view(node):
        return 0
    dtype = getattr(torch, node.meta[DTYPE])
    count = 1
    for n in shape:
        count *= n
    return int(count * dtype.itemsize)


def _suffix_peak(rerun: list[Node], size: dict[Node, int]) -> int:
    last = last_uses(rerun)
    held: dict[Node, int] = {}
    peak = 0
    for position, node in enumerate(rerun):
        held[node] = size[node]
        peak = max(peak, sum(held.values()))
        held = {n: b for n, b in held.items() if last[n] > position or n is node}
    return peak
