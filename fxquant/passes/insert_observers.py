"""Insert observers.

before: `fc = self.fc(x)`
after:  `x_observer = self.x_observer(x); fc = self.fc(x_observer)`

One observer watches each value that enters linear layers, however many of them it feeds.
"""

from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.scopes import finish, sites
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
        OptionError: the observer's name or an option is unknown.
    """
    create_observer(observer, **options)  # a wrong name fails even where nothing is observed
    observed = copy_sharing_tensors(gm)
    for site in list(sites(observed)):
        if not isinstance(site.module, nn.Linear) or not isinstance(site.node.args[0], Node):
            continue
        source = site.node.args[0]
        if isinstance(_module_of(site.scope.gm, source), Observer):
            continue
        existing = _observer_of(site.scope.gm, source)
        if existing is None:
            existing = _insert(site.scope.gm, source, create_observer(observer, **options))
            existing.meta[MODULE_PATH] = site.node.meta.get(MODULE_PATH)
        site.node.replace_input_with(source, existing)
    finish(observed)
    return observed


def observed_inputs(observed: GraphModule) -> dict[str, Observer]:
    """The observer of each linear layer's input, by the layer's name."""
    found = {}
    for site in sites(observed):
        source = site.node.args[0] if site.node.args else None
        watcher = _module_of(site.scope.gm, source)
        if isinstance(site.module, nn.Linear) and isinstance(watcher, Observer):
            found[site.name] = watcher
    return found


def _insert(gm: GraphModule, source: Node, observer: Observer) -> Node:
    name = f"{source.name}_observer"
    gm.add_submodule(name, observer)
    with gm.graph.inserting_after(source):
        return gm.graph.call_module(name, (source,))


def _observer_of(gm: GraphModule, source: Node) -> Node | None:
    for user in source.users:
        if isinstance(_module_of(gm, user), Observer):
            return user
    return None


def _module_of(gm: GraphModule, node: object) -> nn.Module | None:
    if isinstance(node, Node) and node.op == "call_module":
        return gm.get_submodule(str(node.target))
    return None
