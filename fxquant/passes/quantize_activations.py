"""Turn calibrated ranges into quantize/dequantize nodes.

before: `fc = self.fc(x)`
after:  `q = quantize_activation(x, self.x_scale, self.x_zero_point)`
        `fc = self.fc(dequantize_activation(q, self.x_scale, self.x_zero_point, x))`
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import OptionError
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.effects import writes_before
from fxquant.graph.layers import Site, finish, free_name, sites, tensor_attribute
from fxquant.graph.shapes import MODULE_PATH
from fxquant.modules.activation import (
    channel_qparams,
    dequantize_activation,
    finer_by,
    quantize_activation,
)
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.linear import QuantizedLinear
from fxquant.observers import Observer
from fxquant.observers.input_statistics import InputStatistics


def quantize_activations(
    gm: GraphModule,
    observers: Mapping[str, Observer],
    statistics: Mapping[str, InputStatistics] | None = None,
) -> GraphModule:
    """Quantize the input of every quantized layer that multiplies it, statically.

    Args:
        gm: a rewritten graph; it is not changed.
        observers: the calibrated observer of each layer's input, by the layer's name. Its range
            says what is clipped.
        statistics: of the layers' inputs, by name: each channel of a linear layer's input gets a
            grid of its own. Without them, and of other layers, all channels share the observer's.

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
        if not isinstance(site.module, QuantizedLayer):
            continue
        if site.is_inside:  # no node to put the quantization in front of
            quantize_activations_dynamically(site.module)
            continue
        if source is None:
            continue
        if source.target is dequantize_activation or site.name not in observers:
            continue
        place = source, written[site.node]
        if place not in made:
            by_channel = statistics if isinstance(site.module, QuantizedLinear) else None
            made[place] = _insert(
                site, source, observers[site.name], (by_channel or {}).get(site.name)
            )
        site.node.replace_input_with(source, made[place])
    finish(rewritten)
    return rewritten


def quantize_activations_dynamically(model: nn.Module) -> None:
    """Let every quantized layer that multiplies its input round it itself, in place."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.activation = "int8"


def with_activations(
    gm: GraphModule,
    observers: Mapping[str, Observer],
    statistics: Mapping[str, InputStatistics],
    is_dynamic: bool,
) -> tuple[GraphModule, dict[str, str]]:
    """Quantize the inputs of all quantized layers that multiply them.

    Args:
        gm: a rewritten graph. With dynamic ranges its layers are changed in place.
        observers: as in `quantize_activations`, like `statistics`.
        statistics: see there.
        is_dynamic: whether ranges are found while the model runs.

    Returns:
        The graph, and how each layer's input is rounded, by the layer's name.
    """
    if is_dynamic:
        quantize_activations_dynamically(gm)
    else:
        gm = quantize_activations(gm, observers, statistics)
    return gm, _notes(gm)


def _notes(gm: GraphModule) -> dict[str, str]:
    """How each quantized layer's input is rounded, by the layer's name, for the decisions."""
    found = {}
    for site in sites(gm):
        if not isinstance(site.module, QuantizedLayer):
            continue
        arithmetic = site.module.activation_arithmetic
        if site.input is not None and site.input.target is dequantize_activation:
            found[site.name] = "static 8-bit activations, simulated"
        elif arithmetic is not None:
            found[site.name] = f"dynamic 8-bit activations, {arithmetic}"
    return found


def static_grids(gm: GraphModule) -> dict[str, tuple[Tensor, Tensor] | None]:
    """Scale and zero point with which each quantized layer's input is rounded in front of it.

    Args:
        gm: a quantized graph.

    Returns:
        By the layer's name; None for a layer that is called several times, with other grids or with
        none. Layers that read float values are left out.
    """
    grids: dict[str, tuple[Tensor, Tensor] | None] = {}
    floats = set()
    for site in sites(gm):
        if not isinstance(site.module, QuantizedLayer) or site.input is None:
            continue
        if site.input.target is not dequantize_activation:
            floats.add(site.name)
            continue
        found = _grid_of(gm, site.input)
        known = grids.setdefault(site.name, found)
        if known is None or found is None or not all(map(torch.equal, known, found)):
            grids[site.name] = None
    return {name: None if name in floats else grid for name, grid in grids.items()}


def _grid_of(gm: GraphModule, rounded: Node) -> tuple[Tensor, Tensor] | None:
    """Scale and zero point of a dequantized value, where the graph holds them as tensors."""
    held = [
        tensor_attribute(gm, node)
        for node in rounded.args[1:3]
        if isinstance(node, Node) and node.op == "get_attr"
    ]
    if len(held) != 2 or not all(isinstance(t, Tensor) and t.ndim <= 1 for t in held):
        return None
    scale, zero_point = held
    return (scale, zero_point) if scale.shape == zero_point.shape else None


def _insert(
    site: Site, source: Node, observer: Observer, statistics: InputStatistics | None
) -> Node:
    """The dequantized value that takes the place of `source`."""
    _check_integer(site.name, observer)
    grid = observer.calculate_qparams()
    if statistics is not None and statistics.tokens:
        ends = statistics.lowest, statistics.highest
        grid = channel_qparams(*ends, *observer.clipping_range(finer_by(*ends)))
    return insert_grid(site.gm, site.node, source, grid, site.node.meta.get(MODULE_PATH))


def insert_grid(
    gm: GraphModule,
    before: Node,
    source: Node,
    grid: tuple[Tensor, Tensor],
    path: str | None = None,
) -> Node:
    """Round a value in front of a node.

    Args:
        gm: the graph; it gets the grid's tensors.
        before: the node.
        source: the value.
        grid: scale and zero point, as `quantize_activation` takes them.
        path: of the module that the new nodes belong to.

    Returns:
        The dequantized value; nothing reads it yet.
    """
    nodes = list[Node]()
    for kind, values in zip(("scale", "zero_point"), grid, strict=True):
        name = free_name(gm, f"{source.name}_{kind}")
        gm.register_buffer(name, values.float())
        with gm.graph.inserting_before(before):
            nodes.append(gm.graph.get_attr(name))
    with gm.graph.inserting_before(before):
        q = gm.graph.call_function(quantize_activation, (source, *nodes))
        made = gm.graph.call_function(dequantize_activation, (q, *nodes, source))
    for node in (*nodes, q, made):
        node.meta[MODULE_PATH] = path
    return made


def _check_integer(name: str, observer: Observer) -> None:
    if observer.integer != "uint8":
        raise OptionError(
            f"the observer of {name}",
            found=f"a grid of {observer.integer} integers",
            needed="uint8, which quantize_activation stores",
            remedy="Make the observers without the option integer.",
        )
