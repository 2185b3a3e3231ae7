"""Quantized linear layers that read one value become one layer: q, k, v; gate and up.

before: `q = self.q(x)`, `k = self.k(x)`, `v = self.v(x)`
after:  `qkv = self.q_k_v(x)`, `q = qkv[0]`, `k = qkv[1]`, `v = qkv[2]`

Each output has the same bits: a row of a weight is multiplied alike whatever rows lie beside it.
"""

import operator
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch.fx import GraphModule, Node

from fxquant.fusion.strides import free_strides, let_strides_change
from fxquant.graph.effects import writes_before
from fxquant.graph.layers import has_hooks, target_of
from fxquant.modules.embedding import QuantizedEmbedding
from fxquant.modules.fused_linear import FusedLinear
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.modules.linear_int8 import QuantizedLinearInt8
from fxquant.modules.linear_intn import QuantizedLinearIntN
from fxquant.numerics.quantized_weight import QuantizedWeight

FORMATS = (QuantizedLinearInt4, QuantizedLinearInt8, QuantizedLinearIntN)


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
    calls = _calls(gm)
    writes = writes_before(gm)
    owners = _owners(gm)
    groups: dict[Hashable, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        layer = _layer(gm, node)
        if layer is None or calls[str(node.target)] > 1 or owners[id(layer.packed_memory)] > 1:
            continue
        groups[node.args[0], writes[node], _format(layer)].append(node)
    return (nodes for nodes in groups.values() if len(nodes) > 1)


def _layer(gm: GraphModule, node: Node) -> QuantizedLinearIntN | None:
    """The layer that a node calls with nothing but a value, if it is one that can be joined."""
    if node.op != "call_module" or node.kwargs or len(node.args) != 1:
        return None
    layer = gm.get_submodule(str(node.target))
    if type(layer) not in FORMATS or has_hooks(layer) or not isinstance(node.args[0], Node):
        return None
    assert isinstance(layer, QuantizedLinearIntN)  # for type checkers
    return layer


def _calls(gm: GraphModule) -> dict[str, int]:
    """How often each target is called, under all names that its module has."""
    times: dict[int, int] = defaultdict(int)
    targets = [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]
    for target in targets:
        times[id(gm.get_submodule(target))] += 1
    return {target: times[id(gm.get_submodule(target))] for target in targets}


def _owners(gm: GraphModule) -> dict[int, int]:
    """How many layers hold each packed weight: tied ones must go on sharing it."""
    owners: dict[int, int] = defaultdict(int)
    for module in gm.modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            owners[id(module.packed_memory)] += 1
    return owners


def _format(layer: QuantizedLinearIntN) -> Hashable:
    """What layers must have in common to be one."""
    bias = None if layer.bias is None else layer.bias.dtype
    return (
        type(layer), layer.in_features, layer.bits, layer.group_size, layer.symmetric, bias,
        layer.activation, layer.backend, layer.weight.dtype, layer.weight.device, layer.training,
    )  # fmt: skip


def _fuse(gm: GraphModule, nodes: Sequence[Node]) -> None:
    layers = [layer for node in nodes if (layer := _layer(gm, node)) is not None]
    target = _free_target(gm, nodes)
    gm.add_submodule(target, _joined(layers))
    with gm.graph.inserting_before(nodes[0]):
        fused = gm.graph.call_module(target, nodes[0].args)
    for number, node in enumerate(nodes):
        node.op, node.target, node.args = "call_function", operator.getitem, (fused, number)


def _joined(layers: Sequence[QuantizedLinearIntN]) -> FusedLinear:
    first = layers[0]
    weight = QuantizedWeight.joined([layer.quantized_weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    linear = type(first)(weight, bias, first.activation, first.weight.dtype)
    linear.train(first.training)
    sizes = tuple(layer.out_features for layer in layers)
    return FusedLinear(first.in_features, sizes, linear).train(first.training)


def _free_target(gm: GraphModule, nodes: Sequence[Node]) -> str:
    """A path beside the first layer, with the last parts of all names: `attn.q_k_v`."""
    parent, _, _ = str(nodes[0].target).rpartition(".")
    name = "_".join(str(node.target).rpartition(".")[2] for node in nodes)
    taken = {path for path, _ in gm.named_modules(remove_duplicate=False)}
    return target_of(f"{parent}.{name}" if parent else name, taken)
