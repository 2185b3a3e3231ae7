"""Turn calibrated ranges into quantize/dequantize nodes.

before: `fc = self.fc(x)`
after:  `q = quantize_activation(x, scale, zero_point)`
        `fc = self.fc(dequantize_activation(q, scale, zero_point, x))`
"""

from collections.abc import Mapping

from torch.fx import GraphModule, Node

from fxquant.errors import OptionError
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.scopes import sites
from fxquant.graph.shapes import MODULE_PATH
from fxquant.modules.activation import dequantize_activation, quantize_activation
from fxquant.modules.linear import QuantizedLinear
from fxquant.observers import Observer


def quantize_activations(gm: GraphModule, observers: Mapping[str, Observer]) -> GraphModule:
    """Quantize the input of every quantized linear layer, statically, per tensor.

    Args:
        gm: a rewritten graph; it is not changed.
        observers: the calibrated observer of each layer's input, by the layer's name.

    Returns:
        A new graph; a value that feeds several layers is quantized once. Layers whose input is
        quantized already are left as they are.

    Raises:
        CalibrationError: an observer saw nothing, NaN or Inf.
        OptionError: an observer's grid is not of unsigned integers.
    """
    rewritten = copy_sharing_tensors(gm)
    made: dict[Node, Node] = {}
    for site in list(sites(rewritten)):
        source = site.node.args[0] if site.node.args else None
        if not isinstance(site.module, QuantizedLinear) or not isinstance(source, Node):
            continue
        if source.target is dequantize_activation or site.name not in observers:
            continue
        if source not in made:
            _check_integer(site.name, observers[site.name])
            scale, zero_point = observers[site.name].calculate_qparams()
            grid = float(scale), int(zero_point)
            with site.scope.gm.graph.inserting_after(source):
                q = site.scope.gm.graph.call_function(quantize_activation, (source, *grid))
            with site.scope.gm.graph.inserting_after(q):
                made[source] = site.scope.gm.graph.call_function(
                    dequantize_activation, (q, *grid, source)
                )
            for node in (q, made[source]):
                node.meta[MODULE_PATH] = site.node.meta.get(MODULE_PATH)
        site.node.replace_input_with(source, made[source])
        site.scope.gm.graph.lint()
        site.scope.gm.recompile()
    return rewritten


def _check_integer(name: str, observer: Observer) -> None:
    if observer.integer != "uint8":
        raise OptionError(
            f"the observer of {name}",
            found=f"a grid of {observer.integer} integers",
            needed="uint8, which quantize_activation stores",
            remedy="Make the observers without the option integer.",
        )
