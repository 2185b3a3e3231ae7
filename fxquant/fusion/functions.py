"""A function that follows a linear layer is applied to its output while that is in the cache.

before: `y = self.fc(x)`, `z = gelu(y)`
after:  `z = self.fc_gelu(x)`

Both forms of GELU, ReLU, SiLU and tanh, as functions and as modules; the form of GELU with tanh
also where a model writes it out in sums and products. Between the two nothing but views of the
whole output may stand, and nobody else may read it.
"""

from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.fusion.layers import OwnLayers, free_target
from fxquant.fusion.matching import Formula, Value, match
from fxquant.graph.effects import writes
from fxquant.graph.layers import has_hooks
from fxquant.graph.ops import op_name, op_of
from fxquant.modules.fused_linear import FusedLinear

_OPS = {"relu": "relu", "silu": "silu", "tanh": "tanh"}
_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh"}
_GELU: dict[tuple[Any, ...], str] = {
    (): "gelu",
    (("approximate", "none"),): "gelu",
    (("approximate", "tanh"),): "gelu_tanh",
}
_NO_OPTIONS: tuple[Any, ...] = (
    (), (False,), (True,), (("inplace", False),), (("inplace", True),),
)  # fmt: skip
_X = Value("x")
_CUBIC = Formula("add", _X, Formula("mul", Formula("pow", _X, 3), 0.044715))
_TANH = Formula("tanh", Formula("mul", _CUBIC, 0.7978845608028654))
WRITTEN_OUT = Formula("mul", Formula("mul", _X, 0.5), Formula("add", _TANH, 1))


def fuse_functions(gm: GraphModule) -> None:
    """Fuse each function with the layer before it, if that is its own."""
    own = OwnLayers(gm)
    for node in list(gm.graph.nodes):
        found = function_of(gm, node)
        if found is None:
            continue
        function, source, readers = found
        call = _call_behind(source, readers)
        layer = own.layer(call)
        if call is None or layer is None:
            continue
        target = free_target(gm, [str(call.target), function])
        sizes = (layer.out_features,)
        fused = FusedLinear(layer.in_features, sizes, function, layer).train(layer.training)
        gm.add_submodule(target, fused)
        call.target = target
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)


def function_of(
    gm: GraphModule, node: Node, in_place: bool = False
) -> tuple[str, Node, int] | None:
    """The name of the function that a node applies, to what, and how often that is read for it.

    The name is one of `kernels.functions.FUNCTIONS`; None where the node applies none of them, or,
    unless `in_place` allows it, writes into what it reads.
    """
    if writes(node, gm) and not in_place:
        return None
    written_out = match(node, WRITTEN_OUT)
    if written_out is not None:
        return "gelu_tanh", written_out["x"], 3
    name = _module_name(gm, node) if node.op == "call_module" else _op_name(node)
    source = node.args[0] if node.args else None
    return (name, source, 1) if name is not None and isinstance(source, Node) else None


def _module_name(gm: GraphModule, node: Node) -> str | None:
    module: Any = gm.get_submodule(str(node.target))
    if has_hooks(module) or len(node.args) != 1 or node.kwargs:
        return None
    if type(module) is nn.GELU:
        return _GELU[("approximate", module.approximate),]
    return _MODULES.get(type(module))


def _op_name(node: Node) -> str | None:
    options: tuple[Any, ...] = (*node.args[1:], *node.kwargs.items())
    name = op_name(node)
    if name == "gelu":
        return _GELU.get(options)
    # Those that write have been let in, or not, before.
    return _OPS.get(name.removesuffix("_")) if options in _NO_OPTIONS else None


def _call_behind(source: Node, readers: int) -> Node | None:
    """The node whose output `source` is, alone or through views of all of it, read by no other."""
    if len(source.users) != readers:
        return None
    node = source
    while op_of(node).view and op_of(node).moves:
        before = node.args[0]
        if not isinstance(before, Node) or len(before.users) != 1:
            return None
        node = before
    return node
