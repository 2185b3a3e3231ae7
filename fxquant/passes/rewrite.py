"""Rewrite: carry the decisions out.

before: `fc = self.fc(x)` with `fc` an `nn.Linear`
after:  `fc = self.fc(x)` with `fc` a `QuantizedLinearInt4`, `...Int8` or `...IntN`
"""

from collections.abc import Callable, Iterable, Mapping

from torch import nn
from torch.fx import GraphModule

from fxquant.graph.copying import copy_owning_tensors
from fxquant.graph.graph_module import check_graph
from fxquant.graph.layers import finish, keep_bias_absent, replace_layer, sites
from fxquant.modules.embedding import QuantizedEmbedding
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.weight_forms import form_of
from fxquant.passes.decide import Decision
from fxquant.passes.layer_maker import naming
from fxquant.report.progress import steps

QuantizeLayer = Callable[[str, nn.Module, int], QuantizedLayer]


def rewrite(
    gm: GraphModule, decisions: Iterable[Decision], quantize_layer: QuantizeLayer
) -> GraphModule:
    """Swap each layer that the decisions select.

    Args:
        gm: a traced model; it is not changed.
        decisions: from `decide`.
        quantize_layer: makes a quantized layer from `(name, layer, bits)`.

    Returns:
        A new graph on memory of its own, whose nodes have the same names and whose parameters need
        no gradient. A layer called from several nodes stays one module.

    Raises:
        WeightError: a weight cannot be quantized; the layer is named.
    """
    chosen = chosen_layers(gm, decisions)
    made = {
        layer: _quantize(name, layer, bits, quantize_layer)
        for layer, (name, bits) in steps(chosen.items(), "rounding layers", total=len(chosen))
    }
    for site in sites(gm):
        if site.is_inside and site.module in made:
            keep_bias_absent(site.module, made[site.module])
    return replace_layers(gm, made)


def chosen_layers(
    gm: GraphModule, decisions: Iterable[Decision]
) -> dict[nn.Module, tuple[str, int]]:
    """The name and the bits of each layer of a graph that the decisions select, in its order."""
    bits = {d.module: d.bits for d in decisions if d.bits is not None}
    return {
        site.module: (site.name, bits[site.name])
        for site in sites(gm)
        if form_of(site.module) is not None and site.name in bits
    }


def replace_layers(gm: GraphModule, made: Mapping[nn.Module, nn.Module]) -> GraphModule:
    """A copy of a graph, with memory of its own, in which some layers are others.

    Args:
        gm: a graph; it is not changed.
        made: the new layer for each old one.
    """
    numbers = {layer: i for i, layer in enumerate(dict.fromkeys(s.module for s in sites(gm)))}
    rewritten = copy_owning_tensors(gm, keep=made.__contains__)
    layers = list(dict.fromkeys(site.module for site in sites(rewritten)))
    for layer, other in made.items():
        replace_layer(layers[numbers[layer]], other)
    share_tables(rewritten)
    freeze(rewritten)
    finish(rewritten)
    return rewritten


def freeze(module: nn.Module) -> None:
    """Let no parameter need a gradient (those of TorchScript modules cannot be changed)."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.is_leaf:
            parameter.requires_grad_(False)


def share_tables(model: nn.Module) -> None:
    """Let each embedding hold the very layer that reads its packed weight too, if there is one.

    Then the two stay one when the model is copied, moved and saved.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    tables = {id(m.packed_memory): m for m in reversed(layers)}
    embeddings = [m for m in model.modules() if isinstance(m, QuantizedEmbedding)]
    own = {id(m.table) for m in embeddings}
    tables |= {id(m.packed_memory): m for m in layers if id(m) not in own}
    for embedding in embeddings:
        embedding.table = tables[id(embedding.table.packed_memory)]


def _quantize(
    name: str, layer: nn.Module, bits: int, quantize_layer: QuantizeLayer
) -> QuantizedLayer:
    with naming(name):
        return quantize_layer(name, layer, bits).eval()


def dequantize_model(qmodel: GraphModule) -> GraphModule:
    """A float model with the same weights: each quantized layer becomes what it was made of.

    Args:
        qmodel: a quantized graph; it is not changed.

    Returns:
        A new graph. Activation quantize/dequantize nodes stay.
    """
    check_graph("dequantize_model", qmodel)
    layers = {s.module for s in sites(qmodel) if isinstance(s.module, QuantizedLayer)}
    return replace_layers(qmodel, {layer: layer.to_float() for layer in layers})
