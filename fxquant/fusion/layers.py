"""The quantized linear layers that a graph calls, layers made of several, and places for them."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.layers import has_hooks, target_of
from fxquant.modules.embedding import QuantizedEmbedding
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.modules.linear_int8 import QuantizedLinearInt8
from fxquant.modules.linear_intn import QuantizedLinearIntN
from fxquant.numerics.quantized_weight import QuantizedWeight

LINEAR_CLASSES = (QuantizedLinearInt4, QuantizedLinearInt8, QuantizedLinearIntN)


def called_layer(gm: GraphModule, node: object) -> QuantizedLinearIntN | None:
    """The quantized linear layer that a node calls with nothing but a value, or None."""
    if not isinstance(node, Node) or node.op != "call_module" or node.kwargs:
        return None
    layer = gm.get_submodule(str(node.target))
    is_plain = type(layer) in LINEAR_CLASSES and not has_hooks(layer)
    if not is_plain or len(node.args) != 1 or not isinstance(node.args[0], Node):
        return None
    assert isinstance(layer, QuantizedLinearIntN)  # for type checkers
    return layer


class OwnLayers:
    """Tells the layers that one node calls, and whose weight no other layer shares."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._calls: dict[int, int] = defaultdict(int)
        self._owners: dict[int, int] = defaultdict(int)
        for node in gm.graph.nodes:
            if node.op == "call_module":
                self._calls[id(gm.get_submodule(str(node.target)))] += 1
        for module in gm.modules():
            if isinstance(module, QuantizedEmbedding):  # a head that is tied is its table
                self._owners[id(module.table.packed_memory)] += 1
            elif isinstance(module, QuantizedLinear):
                self._owners[id(module.packed_memory)] += 1

    def layer(self, node: object) -> QuantizedLinearIntN | None:
        """The layer that a node calls, if it is the node's own."""
        layer = called_layer(self._gm, node)
        if layer is None or self._calls[id(layer)] > 1:
            return None
        return layer if self._owners[id(layer.packed_memory)] == 1 else None


def format_of(layer: QuantizedLinearIntN) -> Hashable:
    """What layers must have in common to be one: see `joined`."""
    bias = None if layer.bias is None else layer.bias.dtype
    return (
        type(layer), layer.in_features, layer.bits, layer.group_size, layer.symmetric,
        layer.code_book, bias, layer.activation, layer.backend, layer.weight.dtype,
        layer.weight.device, layer.training,
    )  # fmt: skip


def joined(
    layers: Sequence[QuantizedLinearIntN], order: Tensor | None = None
) -> QuantizedLinearIntN:
    """One layer with the rows of several of one format.

    Args:
        layers: their rows lie one below the other.
        order: for each row of the result, which of these it is; None: as they lie.
    """
    first = layers[0]
    weight = QuantizedWeight.joined([layer.quantized_weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    if order is not None:
        order = order.to(weight.packed.device)
        weight, bias = weight.rows(order), None if bias is None else bias[order]
    return type(first)(weight, bias, first.activation, first.weight.dtype).train(first.training)


def free_target(gm: GraphModule, targets: Sequence[str]) -> str:
    """A path beside the first target, with the last parts of all: `attn.q_k_v`."""
    parent, _, _ = targets[0].rpartition(".")
    name = "_".join(target.rpartition(".")[2] for target in targets)
    taken = {path for path, _ in gm.named_modules(remove_duplicate=False)}
    return target_of(f"{parent}.{name}" if parent else name, taken)
