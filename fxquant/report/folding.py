"""Folding repeated blocks of a graph, so that a deep model stays readable.

A block is a module whose name ends in a number, such as `layers.7`. Of blocks that repeat, the
first stays open; each other one becomes a single node.
"""

from collections import defaultdict
from typing import Any

import networkx as nx

LEAST_REPETITIONS = 3  # of a block, for it to be folded


def fold_repeats(graph: "nx.MultiDiGraph[str]") -> "nx.MultiDiGraph[str]":
    """A copy of `graph` in which repeated blocks are single nodes.

    Args:
        graph: nodes have `scope`, the path of the module they run in, and `sqnr_db`.

    Returns:
        The folded graph; a folded node has `folded`, how many nodes it stands for, and the least
        `sqnr_db` among them. The graph itself where nothing repeats.
    """
    blocks: dict[str, list[str]] = defaultdict(list)
    for name, data in graph.nodes(data=True):
        block = block_of(data.get("scope") or "")
        if block is not None:
            blocks[block].append(name)
    siblings: dict[str, list[str]] = defaultdict(list)
    for block in blocks:
        siblings[block.rpartition(".")[0]].append(block)
    place = {name: name for name in graph}
    for family in siblings.values():
        if len(family) >= LEAST_REPETITIONS:
            for block in family[1:]:
                place.update(dict.fromkeys(blocks[block], block))
    folded = _quotient(graph, place)
    return folded if nx.is_directed_acyclic_graph(folded) else graph


def block_of(scope: str) -> str | None:
    """The outermost numbered module of a path.

    >>> block_of("encoder.layers.3.attention.0.q"), block_of("head")
    ('encoder.layers.3', None)
    """
    parts = scope.split(".")
    for length in range(1, len(parts) + 1):
        if parts[length - 1].isdecimal():
            return ".".join(parts[:length])
    return None


def _quotient(graph: "nx.MultiDiGraph[str]", place: dict[str, str]) -> "nx.MultiDiGraph[str]":
    folded: nx.MultiDiGraph[str] = nx.MultiDiGraph(**graph.graph)
    for name, data in graph.nodes(data=True):
        target = place[name]
        if target == name:
            folded.add_node(name, **data)
        else:
            _absorb(folded, target, data)
    for source, target, data in graph.edges(data=True):
        one, two = place[source], place[target]
        if one != two and not folded.has_edge(one, two):
            folded.add_edge(one, two, **data)
    return folded


def _absorb(folded: "nx.MultiDiGraph[str]", block: str, data: dict[str, Any]) -> None:
    if block not in folded:
        folded.add_node(block, op="block", kind="block", module=block, folded=0, sqnr_db=None)
    node = folded.nodes[block]
    node["folded"] += 1
    node["parameters"] = node.get("parameters", 0) + (data.get("parameters") or 0)
    worst = [v for v in (node["sqnr_db"], data.get("sqnr_db")) if v is not None]
    node["sqnr_db"] = min(worst, default=None)
