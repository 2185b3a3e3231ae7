"""Placing a graph on a page, top to bottom: layers by longest path, ordered by barycentres.

The method is Sugiyama's (1981) without splitting long edges, which is fast and good enough for the
narrow graphs of neural networks.
"""

from collections.abc import Hashable

import networkx as nx

SWEEPS = 4
LAYER_HEIGHT = 46.0
GAP = 14.0


def layered_layout(
    graph: "nx.MultiDiGraph[str]", widths: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """The centre of each node.

    Args:
        graph: acyclic.
        widths: of each node's box.

    Returns:
        `(x, y)` by node, in the unit of the widths; y grows downwards.
    """
    layers = [list(layer) for layer in nx.topological_generations(graph)]
    for sweep in range(SWEEPS):
        _sweep(graph, layers, downwards=sweep % 2 == 0)
    positions = {}
    for level, layer in enumerate(layers):
        total = sum(widths[n] for n in layer) + GAP * (len(layer) - 1)
        x = -total / 2
        for name in layer:
            positions[name] = (x + widths[name] / 2, level * LAYER_HEIGHT)
            x += widths[name] + GAP
    return positions


def _sweep(graph: "nx.MultiDiGraph[str]", layers: list[list[str]], downwards: bool) -> None:
    """Order each layer by the mean place of its neighbours on the side that is settled."""
    place: dict[Hashable, float] = {}
    for layer in layers:
        place.update({name: (i + 0.5) / len(layer) for i, name in enumerate(layer)})
    for layer in layers if downwards else reversed(layers):
        neighbours = graph.predecessors if downwards else graph.successors
        for name in layer:
            around = [place[n] for n in neighbours(name)]
            if around:
                place[name] = sum(around) / len(around)
        layer.sort(key=lambda name: place[name])
        place.update({name: (i + 0.5) / len(layer) for i, name in enumerate(layer)})
