"""A traced, observed or rewritten graph as a `networkx.MultiDiGraph`."""

import math
from collections.abc import Iterator
from typing import Any

import networkx as nx
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.config.skip_rules import type_name
from fxquant.graph.graph_module import check_graph
from fxquant.graph.layers import Site, sites, user_name
from fxquant.graph.shapes import DTYPE, MODULE_PATH, SHAPE
from fxquant.measure.quantization_info import INFO_KEY
from fxquant.modules.layer import QuantizedLayer


def to_networkx(gm: GraphModule, rows: dict[str, Any] | None = None) -> "nx.MultiDiGraph[str]":
    """The graph, for inspection.

    Args:
        gm: any graph of fxquant.
        rows: figures by module name; by default those of the record that `gm` carries.

    Returns:
        A node for each node of the graph, called by its name, with `op`, `target`, `kind`,
        `module`, `scope`, `shape`, `dtype`, `bits`, `parameters` and `sqnr_db` (the error it
        introduced; None where unknown), and an edge for each argument with its position or name as
        `argument`.
    """
    check_graph("graph", gm)
    rows = measured_rows(gm) if rows is None else rows
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph(name=type(gm).__name__)
    for node in gm.graph.nodes:
        graph.add_node(node.name, **describe_node(gm, node, rows))
    for node in gm.graph.nodes:
        for argument, source in _arguments(node):
            graph.add_edge(source.name, node.name, argument=argument)
    for site in sites(gm):
        if site.is_inside:
            graph.add_node(site.target, **_describe_inside(gm, site, rows))
            graph.add_edge(site.node.name, site.target, argument="inside")
    return graph


def describe_node(gm: GraphModule, node: Node, rows: dict[str, Any]) -> dict[str, Any]:
    """The attributes of one node, as plain data."""
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    name = user_name(gm, str(node.target)) if node.op in ("call_module", "get_attr") else None
    row = rows.get(name or "", {})
    return {
        "op": node.op,
        "target": str(node.target) if module or name else type_name(node.target),
        "kind": type(module).__name__ if module is not None else type_name(node.target),
        "module": name,
        "scope": node.meta.get(MODULE_PATH) or name,
        "shape": node.meta.get(SHAPE),
        "dtype": node.meta.get(DTYPE),
        "bits": module.bits if isinstance(module, QuantizedLayer) else None,
        "parameters": parameter_count(module),
        "sqnr_db": row.get("introduced_sqnr_db"),
    }


def _describe_inside(gm: GraphModule, site: Site, rows: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a layer inside the opaque module that a node calls."""
    own = describe_node(gm, site.node, rows)
    layer = site.module
    return {
        **own,
        "target": site.target,
        "kind": type(layer).__name__,
        "module": site.name,
        "scope": site.name,
        "shape": None,
        "dtype": None,
        "bits": layer.bits if isinstance(layer, QuantizedLayer) else None,
        "parameters": parameter_count(layer),
        "sqnr_db": rows.get(site.name, {}).get("introduced_sqnr_db"),
    }


def measured_rows(gm: GraphModule) -> dict[str, Any]:
    """The rows of the quantization record that `gm` carries, by module name."""
    info = gm.meta.get(INFO_KEY) or {}
    return {row["module"]: row for row in info.get("rows", [])}


def parameter_count(module: nn.Module | None) -> int:
    """Elements of a module's weights and biases; packed ones count each."""
    if isinstance(module, QuantizedLayer):
        bias = 0 if module.bias is None else module.bias.numel()
        return math.prod(module.weight_shape) + bias
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def _arguments(node: Node) -> Iterator[tuple[str, Node]]:
    for position, value in (*enumerate(node.args), *node.kwargs.items()):
        yield from _nodes_in(str(position), value)


def _nodes_in(path: str, value: Any) -> Iterator[tuple[str, Node]]:
    if isinstance(value, Node):
        yield path, value
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _nodes_in(f"{path}[{index}]", part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _nodes_in(f"{path}.{key}", part)
    elif isinstance(value, slice):
        for part_name in ("start", "stop", "step"):
            yield from _nodes_in(f"{path}.{part_name}", getattr(value, part_name))
