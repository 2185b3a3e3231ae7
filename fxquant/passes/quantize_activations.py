"""Turn calibrated ranges into quantize/dequantize nodes.

before: `fc = self.fc(x)`
after:  `q = quantize_activation(x, self.x_scale, self.x_zero_point)`
        `fc = self.fc(dequantize_activation(q, self.x_scale, self.x_zero_point, x))`
"""

from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.errors import OptionError
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.effects import writes_before
from fxquant.graph.layers import Site, finish, free_name, sites
from fxquant.graph.shapes import MODULE_PATH
from fxquant.modules.activation import (
    channel_qparams,
    dequantize_activation,
    finer_by,
    quantize_activation,
)
from fxquant.modules.linear import QuantizedLinear
from fxquant.observers import Observer
from fxquant.observers.input_statistics import InputStatistics


def quantize_activations(
    gm: GraphModule,
    observers: Mapping[str, Observer],
    statistics: Mapping[str, InputStatistics] | None = None,
) -> GraphModule:
    """Quantize the input of every quantized linear layer, statically.

    Args:
        gm: a rewritten graph; it is not changed.
        observers: the calibrated observer of each layer's input, by the layer's name. Its range
            says what is clipped.
        statistics: of the layers' inputs, by name: each channel gets a grid of its own. Without
            them, all channels share the observer's.

    Returns:
        A new graph; a value that feeds several layers is quantized once. Layers whose input is
        quantized already are left as they are, and layers inside an opaque module quantize their
        inputs while they run.

    Raises:
        CalibrationError: an observer saw nothing, NaN or Inf.
        OptionError: an observer's grid is not of unsigned integers.
    """
    rewritten = copy_sharing_tensors(gm)
    made: dict[tuple[Node, int], Node] = {}
    written = writes_before(rewritten)
    for site in list(sites(rewritten)):
        source = site.input
        if not isinstance(site.module, QuantizedLinear):
            continue
        if site.is_inside:  # no node to put the quantization in front of
            site.module.activation = "int8"
            continue
        if source is None:
            continue
        if source.target is dequantize_activation or site.name not in observers:
            continue
        place = source, written[site.node]
        if place not in made:
            made[place] = _insert(
                site, source, observers[site.name], (statistics or {}).get(site.name)
            )
        site.node.replace_input_with(source, made[place])
    finish(rewritten)
    return rewritten


def quantize_activations_dynamically(model: nn.Module) -> None:
    """Let every quantized Linear layer round its input to INT8 itself while it runs, in place."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.activation = "int8"


def _insert(
    site: Site, source: Node, observer: Observer, statistics: InputStatistics | None
) -> Node:
    """The dequantized value that takes the place of `source`."""
    _check_integer(site.name, observer)
    grid = observer.calculate_qparams()
    if statistics is not None and statistics.tokens:
        ends = statistics.lowest, statistics.highest
        grid = channel_qparams(*ends, *observer.clipping_range(finer_by(*ends)))
    gm, nodes = site.gm, list[Node]()
    for kind, values in zip(("scale", "zero_point"), grid, strict=True):
        name = free_name(gm, f"{source.name}_{kind}")
        gm.register_buffer(name, values.float())
        with gm.graph.inserting_before(site.node):
            nodes.append(gm.graph.get_attr(name))
    with gm.graph.inserting_before(site.node):
        q = gm.graph.call_function(quantize_activation, (source, *nodes))
        made = gm.graph.call_function(dequantize_activation, (q, *nodes, source))
    for node in (*nodes, q, made):
        node.meta[MODULE_PATH] = site.node.meta.get(MODULE_PATH)
    return made


def _check_integer(name: str, observer: Observer) -> None:
    if observer.integer != "uint8":
        raise OptionError(
            f"the observer of {name}",
            found=f"a grid of {observer.integer} integers",
            needed="uint8, which quantize_activation stores",
            remedy="Make the observers without the option integer.",
        )
