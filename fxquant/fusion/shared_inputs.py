"""Quantized linear layers that read one value become one layer: q, k, v; gate and up.

before: `q = self.q(x)`, `k = self.k(x)`, `v = self.v(x)`
after:  `qkv = self.q_k_v(x)`, `q = qkv[0]`, `k = qkv[1]`, `v = qkv[2]`

Each output has the same bits: a row of a weight is multiplied alike whatever rows lie beside it.
"""

import operator
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

from torch.fx import GraphModule, Node

from fxquant.fusion.layers import OwnLayers, called_layer, format_of, free_target, joined
from fxquant.fusion.strides import free_strides, let_strides_change
from fxquant.graph.effects import writes_before
from fxquant.modules.fused_linear import FusedLinear
from fxquant.modules.linear_intn import QuantizedLinearIntN


def fuse_shared_inputs(gm: GraphModule) -> None:
    """Fuse the layers of each value that several layers of one format read."""
    for nodes in list(_groups(gm)):
        views = [free_strides(node, gm) for node in nodes]
        free = [node for node, found in zip(nodes, views, strict=True) if found is not None]
        if len(free) < 2:
            continue
        for found in views:
            let_strides_change(found or [])
        _fuse(gm, free)


def _groups(gm: GraphModule) -> Iterator[list[Node]]:
    """Calls of layers that can be one, in the order of the graph."""
    own, writes = OwnLayers(gm), writes_before(gm)
    groups: dict[Hashable, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        layer = own.layer(node)
        if layer is not None:
            groups[node.args[0], writes[node], format_of(layer)].append(node)
    return (nodes for nodes in groups.values() if len(nodes) > 1)


def _fuse(gm: GraphModule, nodes: Sequence[Node]) -> None:
    layers = [layer for node in nodes if (layer := called_layer(gm, node)) is not None]
    target = free_target(gm, [str(node.target) for node in nodes])
    gm.add_submodule(target, _joined(layers))
    with gm.graph.inserting_before(nodes[0]):
        fused = gm.graph.call_module(target, nodes[0].args)
    for number, node in enumerate(nodes):
        node.op, node.target, node.args = "call_function", operator.getitem, (fused, number)


def _joined(layers: Sequence[QuantizedLinearIntN]) -> FusedLinear:
    first = layers[0]
    sizes = tuple(layer.out_features for layer in layers)
    made = FusedLinear(first.in_features, sizes, linear=joined(layers))
    return made.train(first.training)
