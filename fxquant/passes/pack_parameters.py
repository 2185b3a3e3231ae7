"""The parameters of a user's model that the quantized layers of its graph hold as integers.

The graph has a layer for each product with a parameter. The user's model has the parameter and code
of its own, so there the parameter is replaced: by one layer, or by those of all its matrices.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule

from fxquant.graph.layers import sites, user_name
from fxquant.modules.grouped_linear import QuantizedGroupedLinear
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.packed_parameter import PackedParameter, child_name
from fxquant.modules.rounded_input import RoundedInput
from fxquant.passes.quantize_activations import static_grids
from fxquant.tracing.bare_parameters import BareParameter
from fxquant.tracing.trace_report import REPORT_KEY, TraceReport


def bare_layers(gm: GraphModule) -> frozenset[str]:
    """The layers of a graph that may have no other bias than their own.

    Their weight is a parameter that the user's own code multiplies with: it adds the bias that it
    has, or none, and a swapped copy would lose another. Or that code asks whether a layer has one.
    """
    report = gm.meta.get(REPORT_KEY)
    if not isinstance(report, TraceReport):
        return frozenset()
    return frozenset((*report.bare, *report.without_bias))


def packed_parameters(
    model: nn.Module, qmodel: GraphModule
) -> dict[str, tuple[PackedParameter, list[str]]]:
    """What takes the place of parameters of `model`, with the names of the layers it is made of.

    Left out are parameters that the graph reads besides, that belong to two modules or to a layer
    that is called besides, of whose matrices some are float, and whose module has an attribute of
    the child's name already.

    Args:
        model: the user's.
        qmodel: the quantized graph of it, or of one of the same class.
    """
    report = qmodel.meta.get(REPORT_KEY)
    if not isinstance(report, TraceReport):
        return {}
    layers = {site.name: site.module for site in sites(qmodel)}
    rounded = _rounding(qmodel, layers)
    wanted: dict[str, dict[str, BareParameter]] = defaultdict(dict)
    for name, bare in report.bare.items():
        if name in layers:
            wanted[bare.name][name] = bare
    parameters = dict(model.named_parameters(remove_duplicate=False))
    holders = Counter(map(id, parameters.values()))
    read = {user_name(qmodel, str(n.target)) for n in qmodel.graph.nodes if n.op == "get_attr"}
    found = {}
    for name, uses in wanted.items():
        parameter = parameters.get(name)
        if parameter is None or name in read or holders[id(parameter)] > 1:
            continue
        owner, _, child = child_name(name).rpartition(".")
        if (owner in layers and owner not in uses) or hasattr(model.get_submodule(owner), child):
            continue
        packed = _packed(uses, layers, rounded)
        if packed is not None and packed.weight_shape == parameter.shape:
            found[name] = packed, list(uses)
    return found


def _rounding(gm: GraphModule, layers: Mapping[str, nn.Module]) -> dict[nn.Module, RoundedInput]:
    """Layers whose input the graph rounds, as layers that do it themselves."""
    found: dict[nn.Module, RoundedInput] = {}
    for name, grid in static_grids(gm).items():
        layer = layers[name]
        if grid is not None and isinstance(layer, QuantizedLinear | QuantizedGroupedLinear):
            found[layer] = RoundedInput.of(layer, *grid)
    return found


def _packed(
    uses: Mapping[str, BareParameter],
    layers: Mapping[str, nn.Module],
    rounded: Mapping[nn.Module, RoundedInput],
) -> PackedParameter | None:
    """One parameter of the layers that it is in the graph; None where they are not all of it."""
    orders = {bare.is_transposed for bare in uses.values()}
    by_index = {bare.index: layers[name] for name, bare in uses.items()}
    if len(orders) > 1 or len(by_index) < len(uses):
        return None
    if set(by_index) == {None}:
        layer = rounded.get(by_index[None], by_index[None])
        return PackedParameter.of(layer, *orders) if isinstance(layer, QuantizedLayer) else None
    parts = [by_index.get(i) for i in range(len(by_index))]
    linear = [part for part in parts if isinstance(part, QuantizedLinear)]
    if len(linear) < len(parts) or len({part.weight_shape for part in linear}) > 1:
        return None
    out_features, in_features = linear[0].weight_shape
    joined = QuantizedGroupedLinear(len(linear), in_features, out_features, linear)
    return PackedParameter.of(joined, *orders)
