"""Every node that uses parameters, wherever it is: what the ledger has a row for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph.scopes import Scope, scopes, sites, tensor_attribute, user_name


@dataclass(frozen=True)
class WeightedNode:
    """A layer or an op with parameters.

    Attributes:
        name: the user's name of the module that owns the parameters.
        kind: the module's class, or the op that reads the parameters.
        parameters: the distinct tensors.
        module: the module, where a node calls one.
        is_opaque: whether it runs inside a module that is not a graph.
    """

    name: str
    kind: Any
    parameters: tuple[Tensor, ...]
    module: nn.Module | None = None
    is_opaque: bool = False

    @property
    def parameter_count(self) -> int:
        """Elements of all parameters."""
        return sum(p.numel() for p in self.parameters)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first parameter (a linear layer's weight [out, in])."""
        return tuple(self.parameters[0].shape)


def weighted_nodes(gm: GraphModule) -> list[WeightedNode]:
    """One entry a name, in the order of the graph; a module called twice has one."""
    found: dict[str, WeightedNode] = {}
    for node in (*_called_modules(gm), *_bare_parameters(gm), *_opaque_modules(gm)):
        found.setdefault(node.name, node)
    return list(found.values())


def _called_modules(gm: GraphModule) -> Iterator[WeightedNode]:
    for site in sites(gm):
        parameters = tuple(site.module.parameters())
        if parameters:
            yield WeightedNode(site.name, type(site.module), parameters, site.module)


def _bare_parameters(gm: GraphModule) -> Iterator[WeightedNode]:
    for scope in scopes(gm):
        for node in scope.gm.graph.nodes:
            if node.op != "get_attr" or not isinstance(
                value := tensor_attribute(scope.gm, node), nn.Parameter
            ):
                continue
            owner = str(node.target).rpartition(".")[0] or str(node.target)
            kind = _reader(node)
            yield WeightedNode(scope.name_of(owner), kind, (value,))


def _reader(node: Node) -> Any:
    reader = next(iter(node.users), None)
    return reader.target if reader is not None else "unused"


def _opaque_modules(gm: GraphModule) -> Iterator[WeightedNode]:
    """Modules with own parameters that opaque code calls: no node of any graph stands for them."""
    reached = {id(module) for site in sites(gm) for module in site.module.modules()}
    inside = {id(m) for scope in scopes(gm) for m in _graph_parts(scope)}
    for path, module in gm.named_modules():
        own = tuple(module.parameters(recurse=False))
        if own and id(module) not in reached | inside and not isinstance(module, GraphModule):
            yield WeightedNode(user_name(path), type(module), own, module, is_opaque=True)


def _graph_parts(scope: Scope) -> Iterator[nn.Module]:
    for node in scope.gm.graph.nodes:
        if node.op == "get_attr":
            owner = str(node.target).rpartition(".")[0]
            yield scope.gm.get_submodule(owner)
