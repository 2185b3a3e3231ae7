"""Turn calibrated ranges into quantize/dequantize nodes.

before: `fc = self.fc(x)`
after:  `q = quantize_activation(x, scale, zero_point, self.x_divisor)`
        `fc = self.fc(dequantize_activation(q, scale, zero_point, x, self.x_divisor))`
"""

from collections.abc import Iterable, Mapping

from torch.fx import GraphModule, Node

from fxquant.algorithms.input_statistics import InputStatistics
from fxquant.errors import OptionError
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.scopes import Site, sites
from fxquant.graph.shapes import MODULE_PATH
from fxquant.modules.activation import (
    channel_divisor,
    dequantize_activation,
    quantize_activation,
)
from fxquant.modules.linear import QuantizedLinear
from fxquant.observers import Observer
from fxquant.passes.calibrate import calibrate
from fxquant.passes.insert_observers import insert_observers, observed_inputs


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
            made[source] = _insert(site, source, observers[site.name])
        site.node.replace_input_with(source, made[source])
        site.scope.gm.graph.lint()
        site.scope.gm.recompile()
    return rewritten


def equalized_ranges(
    gm: GraphModule,
    observer: str,
    statistics: Mapping[str, InputStatistics],
    data: Iterable[object],
) -> dict[str, Observer]:
    """Observe the inputs of layers with their channels brought to one magnitude.

    Args:
        gm: the float graph; it is not changed.
        observer: a name that `create_observer` knows.
        statistics: of the layers' inputs, by name.
        data: as for `calibrate`.

    Returns:
        A calibrated observer with a divisor for each layer of `statistics`, by name.
    """
    observed = insert_observers(gm, observer)
    watchers = {n: w for n, w in observed_inputs(observed).items() if n in statistics}
    for name, watcher in watchers.items():
        watcher.divisor = channel_divisor(statistics[name].largest)
    calibrate(observed, data, progress=False)
    return watchers


def _insert(site: Site, source: Node, observer: Observer) -> Node:
    """The dequantized value that takes the place of `source`."""
    _check_integer(site.name, observer)
    scale, zero_point = observer.calculate_qparams()
    grid, gm = (float(scale), int(zero_point)), site.scope.gm
    divisor: list[Node] = []
    if observer.divisor is not None:
        name = f"{source.name}_divisor"
        gm.register_buffer(name, observer.divisor)
        with gm.graph.inserting_after(source):
            divisor = [gm.graph.get_attr(name)]
    with gm.graph.inserting_after(*divisor or [source]):
        q = gm.graph.call_function(quantize_activation, (source, *grid, *divisor))
    with gm.graph.inserting_after(q):
        made = gm.graph.call_function(dequantize_activation, (q, *grid, source, *divisor))
    for node in (*divisor, q, made):
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
