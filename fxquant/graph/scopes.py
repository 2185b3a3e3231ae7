"""Graphs inside graphs, and the names their nodes have in the user's model.

An opaque module (one that cannot be traced) is a single node of its parent graph, and its children
are graphs of their own, so a traced model is a tree of `GraphModule`s. Where a graph has to wrap a
module that the user knows under the graph's own name, the module sits in the attribute `_self`;
such path parts are left out of names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import nn

WRAPPED = "_self"


@dataclass(frozen=True)
class Scope:
    """One graph of a traced model and the path of its module from the root."""

    path: str
    gm: torch.fx.GraphModule

    def name_of(self, target: str) -> str:
        """The user's name of the module or tensor that a node of this graph calls `target`."""
        return user_name(f"{self.path}.{target}" if self.path else target)


@dataclass(frozen=True)
class Site:
    """A node that calls a module, wherever its graph is nested."""

    scope: Scope
    node: torch.fx.Node
    name: str
    module: nn.Module


def user_name(path: str) -> str:
    """`path` as the user's model spells it; the model itself is called `model`.

    >>> user_name("_self.encoder.fc._self")
    'encoder.fc'
    """
    return ".".join(part for part in path.split(".") if part != WRAPPED) or "model"


def scopes(gm: torch.fx.GraphModule) -> Iterator[Scope]:
    """The root graph and every graph nested in it, outermost first."""
    for path, module in gm.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            yield Scope(path, module)


def sites(gm: torch.fx.GraphModule) -> Iterator[Site]:
    """Every node of every graph that calls a module other than a nested graph or its wrapper."""
    for scope in scopes(gm):
        for node in scope.gm.graph.nodes:
            if node.op != "call_module":
                continue
            module = scope.gm.get_submodule(node.target)
            if not any(isinstance(m, torch.fx.GraphModule) for m in module.modules()):
                yield Site(scope, node, scope.name_of(node.target), module)


def finish(gm: torch.fx.GraphModule) -> None:
    """Check and recompile every graph, once after all changes: each time costs a walk of all."""
    for scope in scopes(gm):
        scope.gm.graph.lint()
        scope.gm.recompile()


def tensor_attribute(gm: torch.fx.GraphModule, node: torch.fx.Node) -> Any:
    """The value a `get_attr` node reads."""
    owner, _, name = str(node.target).rpartition(".")
    return getattr(gm.get_submodule(owner), name)
