"""A function of one linear layer times another that reads the same value is one call: SwiGLU.

before: `y = silu(self.gate(x)) * self.up(x)`
after:  `y = self.gate_up(x)`

Both layers have one format and as many outputs, a multiple of 32; nobody else reads what stands in
between. Products are formed in float32 and rounded once.
"""

from torch.fx import GraphModule, Node

from fxquant.fusion.functions import function_of
from fxquant.fusion.layers import OwnLayers, format_of, free_target, joined
from fxquant.graph.effects import writes, writes_before
from fxquant.graph.ops import op_name
from fxquant.kernels.functions import GATED_TOGETHER, gate_order
from fxquant.modules.gated_linear import GatedLinear


def fuse_gates(gm: GraphModule) -> None:
    """Fuse each product of a layer's function and another layer, if both are its own."""
    own, before = OwnLayers(gm), writes_before(gm)
    for node in list(gm.graph.nodes):
        found = _gate(gm, node)
        if found is None:
            continue
        function, calls = found
        layers = [layer for call in calls if (layer := own.layer(call)) is not None]
        is_exact = (
            len({call.args[0] for call in calls}) == 1
            and len({before[n] for n in (*calls, node)}) == 1
            and len(layers) == 2
            and len({(format_of(layer), layer.out_features) for layer in layers}) == 1
            and layers[0].out_features % GATED_TOGETHER == 0
        )
        if not is_exact:
            continue
        target = free_target(gm, [str(call.target) for call in calls])
        first, size = layers[0], layers[0].out_features
        linear = joined(layers, gate_order(size))
        fused = GatedLinear(first.in_features, size, function, linear).train(first.training)
        gm.add_submodule(target, fused)
        node.op, node.target, node.args, node.kwargs = "call_module", target, calls[0].args, {}


def _gate(gm: GraphModule, node: Node) -> tuple[str, list[Node]] | None:
    """The function and the calls of both layers where a node is such a product, else None."""
    if op_name(node) != "mul" or len(node.args) != 2 or node.kwargs or writes(node, gm):
        return None
    for gated, other in (node.args, node.args[::-1]):
        if not isinstance(gated, Node) or not isinstance(other, Node):
            return None
        found = function_of(gm, gated)
        if found is None or len(gated.users) != 1 or len(other.users) != 1:
            continue
        function, call, readers = found
        both = [call, other]
        if call is not other and len(call.users) == readers and all(map(_is_call, both)):
            return function, both
    return None


def _is_call(node: Node) -> bool:
    return node.op == "call_module" and len(node.args) == 1
