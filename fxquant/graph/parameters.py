"""Every place that uses parameters: what the table of decisions has a row for."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph.effects import is_foreign
from fxquant.graph.layers import (
    ROOT,
    inner_layers,
    is_layer,
    sites,
    tensor_attribute,
    user_name,
)
from fxquant.graph.ops import kind_of_product, op_of
from fxquant.graph.shapes import MODULE_PATH

_FOLLOWED = 12  # ops between a parameter and the product it goes into


@dataclass(frozen=True)
class ParameterNode:
    """A layer or an op with parameters.

    Attributes:
        name: the user's name of the module that owns the parameters, or of the parameter.
        kind: the module's class, or the op that reads the parameters.
        parameters: the distinct tensors.
        module: the module, where a node calls one.
        is_opaque: whether it runs inside a module that is not traced, and is no linear layer.
        product: the kind of product that its weight is a factor of, or None.
        is_idle: whether it is a linear layer that the graph does not call.
        is_lookup: whether rows of its weight are looked up, as in an embedding.
    """

    name: str
    kind: Any
    parameters: tuple[Tensor, ...]
    module: nn.Module | None = None
    is_opaque: bool = False
    product: str | None = None
    is_lookup: bool = False
    is_idle: bool = False

    @property
    def parameter_count(self) -> int:
        """Elements of all parameters."""
        return sum(p.numel() for p in self.parameters)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first parameter (a linear layer's weight [out, in])."""
        return tuple(self.parameters[0].shape)


IDLE = "fxquant_idle"  # gm.meta: linear layers of the model that the graph does not call: shapes


def parameter_nodes(gm: GraphModule) -> list[ParameterNode]:
    """One entry a name, in the order of the graph; a module called twice has one.

    Linear layers that the graph does not call as such come last, with weights on the meta device.
    """
    found: dict[str, ParameterNode] = {}
    for node in _called_modules(gm):
        found.setdefault(node.name, node)
    for node in _bare_parameters(gm, dict(found)):
        found.setdefault(node.name, node)
    for node in _opaque_modules(gm):
        found.setdefault(node.name, node)
    for name, shape in gm.meta.get(IDLE, {}).items():
        weight = torch.empty(shape, device="meta")
        found.setdefault(name, ParameterNode(name, nn.Linear, (weight,), is_idle=True))
    return list(found.values())


def memory_of(tensor: Tensor) -> int:
    """What is the same for tensors that lie in one memory, also on the meta device."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a wrapper around other tensors
        return id(tensor)


def _called_modules(gm: GraphModule) -> Iterator[ParameterNode]:
    for site in sites(gm):
        is_opaque = not is_layer(site.module) and is_foreign(site.module)
        named = sorted(site.module.named_parameters(), key=lambda item: item[0] != "weight")
        parameters = tuple(parameter for _, parameter in named)  # the weight first
        if parameters and not is_opaque:
            is_lookup = isinstance(site.module, nn.Embedding | nn.EmbeddingBag)
            product = kind_of_product(site.module)
            yield ParameterNode(
                site.name, type(site.module), parameters, site.module,
                product=product, is_lookup=is_lookup,
            )  # fmt: skip


def _bare_parameters(gm: GraphModule, taken: dict[str, ParameterNode]) -> Iterator[ParameterNode]:
    nodes = [
        (node, value)
        for node in gm.graph.nodes
        if node.op == "get_attr" and isinstance(value := tensor_attribute(gm, node), nn.Parameter)
    ]
    by_owner: dict[str, set[int]] = defaultdict(set)
    for node, value in nodes:
        by_owner[_owner(gm, node)].add(id(value))
    for node, value in nodes:
        owner, full = _owner(gm, node), user_name(gm, str(node.target))
        product, is_lookup = _use(node)
        if _is_read_from(taken.get(owner), value):
            if not is_lookup:
                continue
            full = _place_of_lookup(node) or full  # an embedding that is tied to this layer
        is_alone = len(by_owner[owner]) == 1 and owner not in taken and owner != ROOT
        reader = next(iter(node.users), None)
        kind = reader.target if reader is not None else "unused"
        if product == "linear" and value.ndim == 3:
            product = "expert"
        yield ParameterNode(
            owner if is_alone else full, kind, (value,), product=product, is_lookup=is_lookup
        )


def _place_of_lookup(node: Node) -> str | None:
    """The module whose code looks rows of the parameter up, where that is known."""
    places = (user.meta.get(MODULE_PATH) for user in node.users if op_of(user).lookup)
    return next(filter(None, places), None)


def _is_read_from(owner: ParameterNode | None, value: Tensor) -> bool:
    """Whether a parameter belongs to a layer that has a row of its own."""
    return owner is not None and any(p is value for p in owner.parameters)


def _owner(gm: GraphModule, node: Node) -> str:
    full = user_name(gm, str(node.target))
    return full.rpartition(".")[0] or full


def _use(node: Node, depth: int = 0) -> tuple[str | None, bool]:
    """`(kind of product, is it looked up)` of a value, through views and casts of it."""
    for user in node.users:
        row = op_of(user)
        if row.product is not None or row.lookup:
            return row.product, row.lookup
        if row.name == "getitem" and user.args[0] is node and isinstance(user.args[1], Node):
            return None, True  # rows of a table
        if depth < _FOLLOWED and (row.view or row.cast or row.moves or row.keeps):
            found = _use(user, depth + 1)
            if found != (None, False):
                return found
    return None, False


def _opaque_modules(gm: GraphModule) -> Iterator[ParameterNode]:
    """Modules with own parameters inside opaque ones, beside the layers there."""
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        target = str(node.target)
        outer = gm.get_submodule(target)
        if is_layer(outer) or (
            not is_foreign(outer) and not any(True for _ in inner_layers(outer))
        ):
            continue
        for path, module in outer.named_modules():
            own = tuple(module.parameters(recurse=False))
            if own and not is_layer(module):
                full = f"{target}.{path}" if path else target
                product = kind_of_product(module)
                yield ParameterNode(
                    user_name(gm, full), type(module), own, module, is_opaque=True,
                    product=product,
                    is_lookup=isinstance(module, nn.Embedding | nn.EmbeddingBag),
                )  # fmt: skip
