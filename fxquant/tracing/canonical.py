"""One form for every graph: a layer with parameters is a `call_module` node under its own name.

Before: `linear = aten.linear(x, p_encoder_fc_weight, p_encoder_fc_bias)` (from export), or
`addmm = torch.addmm(self.bias, x, self.weight)` (from a module's own code).
After: `encoder_fc = self.encoder.fc(x)`, where `encoder.fc` is an `nn.Linear` on the same tensors.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxquant.graph.linear_ops import ADDITIONS, linear_operands, transposed_source
from fxquant.graph.scopes import WRAPPED, tensor_attribute
from fxquant.graph.shapes import MODULE_PATH
from fxquant.tracing.export import innermost_module

aten = torch.ops.aten

# Ops of exported graphs that are the whole forward of a torch.nn module, and the position of their
# weight. Only modules of exactly these classes are put back: their forward is this op.
MODULE_OPS: dict[Any, tuple[int, tuple[type[nn.Module], ...]]] = {
    aten.layer_norm.default: (2, (nn.LayerNorm,)),
    aten.rms_norm.default: (2, (nn.RMSNorm,)),
    aten.group_norm.default: (2, (nn.GroupNorm,)),
    aten.embedding.default: (0, (nn.Embedding,)),
    aten.batch_norm.default: (1, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
    aten.conv1d.default: (1, (nn.Conv1d,)),
    aten.conv2d.default: (1, (nn.Conv2d,)),
    aten.conv3d.default: (1, (nn.Conv3d,)),
}


def canonicalize(gm: GraphModule, module: nn.Module) -> GraphModule:
    """Rewrite the layers of `gm`, and return a graph that holds only what it uses.

    Args:
        gm: a plain graph of `module`.
        module: the prepared module: names its parts and lends their tensors.
    """
    names = _Names(gm, module)
    for node in list(gm.graph.nodes):
        node.meta.setdefault(MODULE_PATH, innermost_module(node))
        node.type = None  # annotations of the user's code, which a saved graph does not keep
        if node.op in ("call_function", "call_method"):
            _restore_module(gm, names, node) or _make_linear(gm, names, node)
    for node in reversed(gm.graph.nodes):  # parameters, and their transposes, that went into layers
        is_value = node.op in ("get_attr", "call_function", "call_method")
        if is_value and not node.users and not node.is_impure():
            gm.graph.erase_node(node)
    made = GraphModule(_used(gm, names.made), gm.graph, type(module).__name__)
    made.graph.lint()
    return made.eval()  # a new graph module is in train mode, whatever its modules are


def _used(gm: GraphModule, made: dict[str, nn.Module]) -> dict[str, Any]:
    """The modules and tensors that the nodes of `gm` name."""
    found: dict[str, Any] = {}
    for node in gm.graph.nodes:
        target = str(node.target)
        if node.op == "call_module":
            found[target] = made[target] if target in made else gm.get_submodule(target)
        elif node.op == "get_attr":
            found[target] = tensor_attribute(gm, node)
    return found


def _restore_module(gm: GraphModule, names: "_Names", node: Node) -> bool:
    row = MODULE_OPS.get(node.target)
    path = node.meta.get(MODULE_PATH)
    if row is None or not path:
        return False
    position, classes = row
    owner = names.module.get_submodule(path)
    weight = node.args[position]
    if type(owner) not in classes or not _is_parameter(gm, weight, owner.weight):
        return False
    if getattr(owner, "padding_mode", "zeros") != "zeros" or getattr(owner, "max_norm", None):
        return False  # their forward does more than this op
    names.made[path] = owner
    source = node.args[1 if node.target is aten.embedding.default else 0]
    _replace_by_call(gm.graph, node, path, source)
    return True


def _is_parameter(gm: GraphModule, node: Any, parameter: Any) -> bool:
    return (
        isinstance(node, Node) and node.op == "get_attr" and tensor_attribute(gm, node) is parameter
    )


def _make_linear(gm: GraphModule, names: "_Names", node: Node) -> bool:
    operands = linear_operands(node)
    if operands is None or not isinstance(operands.input, Node):
        return False
    source, is_transposed = operands.weight, operands.is_transposed
    inner = transposed_source(source)
    if inner is not None:
        source, is_transposed = inner, not is_transposed
    weight = _parameter_of(gm, source)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        return False
    if _parameter_of(gm, operands.input) is not None:
        return False
    weight = nn.Parameter(weight.t(), weight.requires_grad) if is_transposed else weight
    bias = _parameter_of(gm, operands.bias)
    if operands.bias is not None and (bias is None or bias.shape != weight.shape[:1]):
        return False
    last = node
    if operands.bias is None:
        addition = _bias_addition(gm, node, weight.shape[0])
        if addition is not None:
            last, bias = addition
    target = names.of(source, weight, bias, node.meta.get(MODULE_PATH))
    names.made.setdefault(target, linear_of(weight, bias))
    _replace_by_call(gm.graph, last, target, operands.input)
    return True


def linear_of(weight: Any, bias: Any) -> nn.Linear:
    """An `nn.Linear` around a weight [out, in] and a bias [out] or None; nothing is copied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = _as_parameter(weight)
    if bias is not None:
        linear.bias = _as_parameter(bias)
    return linear.eval()


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def _parameter_of(gm: GraphModule, node: Any) -> Any:
    """The parameter behind a `get_attr` node, or a constant slice of one; else None."""
    if not isinstance(node, Node):
        return None
    if node.op == "get_attr":
        value = tensor_attribute(gm, node)
        return value if isinstance(value, nn.Parameter) else None
    chunk = _constant_chunk(node)
    if chunk is None:
        return None
    source, count, index = chunk
    value = _parameter_of(gm, source)
    return None if value is None else value.detach().chunk(count)[index]


def _constant_chunk(node: Node) -> tuple[Any, int, int] | None:
    """`(source, chunks, index)` if `node` is one of the chunks of a tensor along its rows."""
    if node.op != "call_function" or len(node.args) != 2 or not isinstance(node.args[1], int):
        return None
    source: Any = node.args[0]
    index = node.args[1]
    is_chunk = isinstance(source, Node) and source.target in (
        "chunk",
        torch.chunk,
        aten.chunk.default,
    )
    if not is_chunk or len(source.args) != 2 or source.kwargs.get("dim", 0) != 0:
        return None
    return source.args[0], source.args[1], index


def _bias_addition(gm: GraphModule, node: Node, out_features: int) -> tuple[Node, Any] | None:
    """The addition of a bias parameter [out] that is the only user of `node`."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    if user.target not in ADDITIONS or len(user.args) != 2 or user.kwargs:
        return None
    left, right = user.args
    bias = _parameter_of(gm, right if left is node else left)
    if bias is None or bias.shape != (out_features,):
        return None
    return user, bias


def _replace_by_call(graph: Graph, node: Node, target: str, source: Any) -> None:
    with graph.inserting_before(node):
        call = graph.create_node("call_module", target, (source,))
    call.meta = {key: value for key, value in node.meta.items() if key == MODULE_PATH}
    node.replace_all_uses_with(call)
    graph.erase_node(node)


class _Names:
    """Names for linear layers made of bare parameters."""

    def __init__(self, gm: GraphModule, module: nn.Module) -> None:
        self.module = module
        self.made: dict[str, nn.Module] = {}
        self.taken = {
            str(n.target)
            for n in gm.graph.nodes
            if n.op == "call_module" or (n.op == "get_attr" and len(n.users) > 1)
        }
        self.given: dict[tuple[int, int, int], str] = {}

    def of(self, source: Node, weight: Tensor, bias: Any, path: str | None) -> str:
        """The target for a linear layer on `weight`; the same layer gets the same name."""
        key = (weight.data_ptr(), weight.shape[0], 0 if bias is None else bias.data_ptr())
        if key not in self.given:
            name = self._module_name(source, path)
            number, free = 1, name
            while free in self.taken:
                number += 1
                free = f"{name}_{number}"
            self.taken.add(free)
            self.given[key] = free
        return self.given[key]

    def _module_name(self, source: Node, path: str | None) -> str:
        suffix = ""
        if source.op != "get_attr":  # a chunk of a packed projection
            chunk = _constant_chunk(source)
            assert chunk is not None  # or it had no parameter
            source, suffix = chunk[0], "_" + "qkv"[chunk[2] % 3]
        owner, _, parameter = str(source.target).rpartition(".")
        if path and self._is_lent(path, parameter):
            owner = path  # a tied weight: the module that uses it, not the one that is named first
        if parameter != "weight":
            stem = parameter.removesuffix("_weight").removesuffix(".weight") + suffix
            return f"{owner}.{stem}" if owner else stem
        return owner + suffix if owner else WRAPPED

    def _is_lent(self, path: str, parameter: str) -> bool:
        try:
            return isinstance(self.module.get_submodule(path), nn.Linear) and parameter == "weight"
        except AttributeError:
            return False
