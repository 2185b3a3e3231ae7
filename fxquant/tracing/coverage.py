"""How much of a model's product weight its graph can see."""

from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph.layers import inner_layers, sites
from fxquant.graph.ops import module_product
from fxquant.graph.parameters import memory_of, parameter_nodes
from fxquant.tracing.oracle import Oracle
from fxquant.tracing.products import is_matrix


@dataclass
class Weight:
    """Elements by kind of product, and the linear layers that nothing calls."""

    product_elements: dict[str, int] = field(default_factory=dict)
    traced_elements: dict[str, int] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    idle: dict[str, list[int]] = field(default_factory=dict)


def weigh(gm: GraphModule, model: nn.Module, prepared: nn.Module, oracle: Oracle | None) -> Weight:
    """Count the parameters of `model` that are factors of a product, and those that `gm` sees.

    Args:
        gm: the traced graph.
        model: the user's model.
        prepared: the working copy, in which computed weights are parameters.
        oracle: knows which modules ran and which parameters were multiplied; None without example.
    """
    weight = Weight()
    traced: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    counted: set[int] = set()
    for node in parameter_nodes(gm):
        if node.product is None or node.is_opaque:
            continue
        for parameter in node.parameters:
            if is_matrix(parameter) and id(parameter) not in counted:
                counted.add(id(parameter))
                traced[node.product] += parameter.numel()
                total[node.product] += parameter.numel()
    seen = {memory_of(p) for n in parameter_nodes(gm) if not n.is_opaque for p in n.parameters}
    for name, kind, parameter in _products_of(model, prepared, oracle):
        if memory_of(parameter) not in seen:
            seen.add(memory_of(parameter))
            total[kind] += parameter.numel()
            weight.unreached.append(name)
    names = {node.name for node in parameter_nodes(gm)}
    called = {site.module for site in sites(gm)}
    own = {name for name, _ in model.named_modules()}
    for name, module in prepared.named_modules():
        if not isinstance(module, nn.Linear) or not name or name in names or module in called:
            continue
        # A stand-in of attention has its projections in two forms; the one that the graph does not
        # call is no layer of the user's.
        if name in own or memory_of(module.weight) not in seen:
            weight.idle[name] = [module.out_features, module.in_features]
            weight.unreached.append(name)
    weight.unreached = list(dict.fromkeys(weight.unreached))
    weight.product_elements, weight.traced_elements = dict(total), dict(traced)
    return weight


def _products_of(
    model: nn.Module, prepared: nn.Module, oracle: Oracle | None
) -> list[tuple[str, str, Tensor]]:
    """`(name, kind, parameter)` of the factors of products, as far as they can be known."""
    if oracle is not None and oracle.spy.seen:
        copies = dict(prepared.named_parameters(remove_duplicate=False))
        parameters = {**dict(model.named_parameters()), **copies}
        return [(n, kind, parameters[n]) for n, kind in oracle.spy.seen.items()]
    found: list[tuple[str, str, Tensor]] = []
    for name, module in prepared.named_modules():
        product = module_product(module)
        if product is None or any(True for _ in inner_layers(module)):
            continue
        for parameter in product[1]:
            value = module._parameters[parameter]
            if value is not None:
                path = name if parameter == "weight" else f"{name}.{parameter}".lstrip(".")
                found.append((path or "model", product[0], value))
    return found
