"""Layers whose weight is a parameter that code of the user's multiplies with itself.

Their weight is the parameter as it lies in memory, or one of its matrices: so a swapped copy can
hold the parameter as packed integers. What is computed of a parameter, or a part of it, is not.
"""

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph.layers import is_plain_linear, sites, tensor_attribute, user_name
from fxquant.graph.parameters import memory_of
from fxquant.modules.grouped_linear import GroupedLinear
from fxquant.tracing.constants import Constant

READ_ONLY = "fxquant_read_only"  # gm.meta: layers made of weights that other code multiplies with
PRODUCTS = (nn.Linear, GroupedLinear)
BARE = "fxquant_bare"  # gm.meta: of these, the ones whose weight is a parameter as it is


@dataclass(frozen=True)
class BareParameter:
    """A parameter that is the weight of a layer.

    Attributes:
        name: of the parameter.
        is_transposed: whether the layer has its last two dimensions swapped.
        index: which matrix of the parameter [matrices, .., ..] it is; None: all of it.
    """

    name: str
    is_transposed: bool
    index: int | None = None


def whole_parameter(name: str, parameter: Tensor, weight: Tensor) -> BareParameter | None:
    """How `weight`, made of a parameter, lies in its memory; None where it is only a part of it.

    Args:
        name: of the parameter.
        parameter: of two or three dimensions, else the answer is None.
        weight: of a layer.
    """
    if parameter.ndim not in (2, 3) or not parameter.numel():
        return None
    index, seen = None, parameter
    if weight.ndim == 2 and parameter.ndim == 3:
        step = parameter.stride(0) * parameter.element_size()
        index = (weight.data_ptr() - parameter.data_ptr()) // step if step else 0
        if not 0 <= index < len(parameter):
            return None
        seen = parameter[index]
    for is_transposed, side in enumerate((seen, seen.mT)):
        if (side.data_ptr(), side.shape, side.stride()) == (
            weight.data_ptr(), weight.shape, weight.stride()
        ):  # fmt: skip
            return BareParameter(name, bool(is_transposed), index)
    return None


def mark_bare(
    gm: GraphModule, module: nn.Module, layer: str, weight: Constant, matrices: Tensor
) -> None:
    """Note a layer whose weight is a parameter, or one of its matrices, as it lies in memory.

    Args:
        gm: the graph; the note is in its `meta`.
        module: the model, which has the parameter.
        layer: the user's name of the layer.
        weight: what the layer was made of.
        matrices: the same as the layer has it.
    """
    if len(weight.sources) != 1:
        return
    source = weight.sources[0]
    name = user_name(gm, str(source.target))
    owner = name.rpartition(".")[0]
    if is_plain_linear(module.get_submodule(owner)) and owner not in gm.meta.get(READ_ONLY, ()):
        return  # a layer of its own
    found = whole_parameter(name, tensor_attribute(gm, source), matrices)
    if found is not None:
        gm.meta.setdefault(BARE, {})[layer] = found


def bare_parameters(gm: GraphModule, model: nn.Module) -> dict[str, BareParameter]:
    """The layers of a graph that have a parameter as it is, by name.

    To those that `mark_bare` noted come the layers of stand-ins for torch's own modules, such as
    the packed projection of `nn.MultiheadAttention`. A parameter that other layers have, too, in
    parts, is left out: no one layer holds it.

    Args:
        gm: the graph; the notes are taken from its `meta`.
        model: whose memory it shares.
    """
    found: dict[str, BareParameter] = gm.meta.pop(BARE, {})
    layers = {site.name: site.module for site in sites(gm) if isinstance(site.module, PRODUCTS)}
    own = {name for name, _ in model.named_modules(remove_duplicate=False)}
    places = {p.data_ptr(): (name, p) for name, p in model.named_parameters()}
    for name in layers.keys() - found.keys() - own:
        weight = layers[name].get_parameter("weight")
        if weight.data_ptr() in places:
            bare = whole_parameter(*places[weight.data_ptr()], weight)
            found |= {} if bare is None else {name: bare}
    readers = Counter(memory_of(layer.get_parameter("weight")) for layer in layers.values())
    return {
        name: bare
        for name, bare in found.items()
        if bare.index is not None
        or name not in layers
        or readers[memory_of(layers[name].get_parameter("weight"))] == 1
    }
