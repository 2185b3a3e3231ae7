"""Insert observers.

before: `fc = self.fc(x)`
after:  `x_observer = self.x_observer(x); fc = self.fc(x_observer)`

One observer watches each value that enters linear layers, however many of them it feeds. Layers
inside an opaque module have no nodes: their ranges are found while the model runs.
"""

from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.effects import writes_before
from fxquant.graph.graph_module import check_graph
from fxquant.graph.layers import Site, finish, free_name, is_plain_linear, sites
from fxquant.graph.shapes import MODULE_PATH
from fxquant.observers import Observer, create_observer


def insert_observers(gm: GraphModule, observer: str = "minmax", **options: Any) -> GraphModule:
    """Watch the input of every linear layer.

    Args:
        gm: a traced model; it is not changed.
        observer: a name that `create_observer` knows.
        **options: passed to each observer.

    Returns:
        A new graph that computes the same, bit for bit. A graph that has observers already is
        returned as a copy.

    Raises:
        OptionError: `gm` is no graph, or the observer's name or an option is unknown.
    """
    check_graph("insert_observers", gm)
    create_observer(observer, **options)  # a wrong name fails even where nothing is observed
    observed = copy_sharing_tensors(gm)
    written, made = writes_before(observed), dict[tuple[Node, int], Node]()
    for site in list(sites(observed)):
        source = site.input
        if not is_plain_linear(site.module) or source is None:
            continue
        if isinstance(_module_of(observed, source), Observer):
            continue
        place = source, written[site.node]
        existing = made.get(place)
        if existing is None:
            existing = made[place] = _insert(observed, site, create_observer(observer, **options))
            existing.meta[MODULE_PATH] = site.node.meta.get(MODULE_PATH)
        site.node.replace_input_with(source, existing)
    finish(observed)
    return observed


def _insert(gm: GraphModule, site: Site, observer: Observer) -> Node:
    """Watch the value right before the layer reads it: ops in between may write into it."""
    assert site.input is not None  # such sites were left out
    name = free_name(gm, f"{site.input.name}_observer")
    gm.add_submodule(name, observer)
    with gm.graph.inserting_before(site.node):
        return gm.graph.call_module(name, (site.input,))


def _module_of(gm: GraphModule, node: object) -> nn.Module | None:
    if isinstance(node, Node) and node.op == "call_module":
        return gm.get_submodule(str(node.target))
    return None
