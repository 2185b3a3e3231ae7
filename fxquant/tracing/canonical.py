"""One form for every graph: a layer with parameters is a `call_module` node under its own name.

Before: `linear = aten.linear(x, p_encoder_fc_weight, p_encoder_fc_bias)` (from export), or
`addmm = torch.addmm(self.bias, x, self.weight)` (from a module's own code).
After: `encoder_fc = self.encoder.fc(x)`, where `encoder.fc` is an `nn.Linear` on the same tensors.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxquant.graph.effects import remove_unused
from fxquant.graph.layers import (
    NAMES_KEY,
    ROOT,
    has_hooks,
    target_of,
    tensor_attribute,
    user_name,
)
from fxquant.graph.linear_operands import LinearOperands, linear_operands
from fxquant.graph.ops import is_addition, op_name
from fxquant.graph.shapes import MODULE_PATH
from fxquant.graph.strided_view import strided_view
from fxquant.modules.float_linear import linear_around
from fxquant.modules.grouped_linear import GroupedLinear
from fxquant.tracing.assemble import make_graph_module
from fxquant.tracing.bare_parameters import READ_ONLY, mark_bare
from fxquant.tracing.constants import Constant, Constants
from fxquant.tracing.einsum import linear_form
from fxquant.tracing.export import innermost_module
from fxquant.tracing.grouped import call_grouped, grouped_product
from fxquant.tracing.recurrent import recurrent_owner, restore_recurrent

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
        gm: a plain graph of `module`; it is taken apart.
        module: the working copy: names its parts and lends their tensors.
    """
    _fold_inquiries(gm)
    remove_unused(gm)
    names = _Names(gm, module)
    constants = Constants(gm)
    for node in list(gm.graph.nodes):
        node.meta.setdefault(MODULE_PATH, innermost_module(node))
        node.type = None  # annotations of the user's code, which a saved graph does not keep
        if _is_linear_by_keyword(gm, node):  # self.fc(input=x)
            node.args, node.kwargs = (next(iter(node.kwargs.values())),), {}
        if op_name(node) == "as_strided" and len(node.args) == 3 and not node.kwargs:
            node.op, node.target = "call_function", strided_view
    nodes = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
    restored = {node for node in nodes if _restore_module(gm, names, node)}
    restored |= {node for node in nodes if node not in restored and _restored(gm, names, node)}
    for node in nodes:  # a layer that is made must not take the name of one that is put back
        if node not in restored:
            _ = _make_linear(gm, names, constants, node) or _make_grouped(
                gm, names, constants, node
            )
    remove_unused(gm)
    return make_graph_module(
        _used(gm, names.made), gm.graph, type(module).__name__, {**gm.meta, NAMES_KEY: names.names}
    )


def _is_linear_by_keyword(gm: GraphModule, node: Node) -> bool:
    if node.op != "call_module" or node.args or len(node.kwargs) != 1:
        return False
    return isinstance(gm.get_submodule(str(node.target)), nn.Linear)


def _use_instead(value: Node, other: Node) -> None:
    """Let all users of `value` read `other`, which is made of it, instead."""
    value.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)


def _fold_inquiries(gm: GraphModule) -> None:
    """Write the dtype and shape of a parameter where the graph asks for them.

    The parameter need not stay in the graph for that, and its module may be replaced.
    """
    for node in list(gm.graph.nodes):
        is_inquiry = op_name(node) == "getattr" and node.args[1] in ("dtype", "shape", "ndim")
        source: Any = node.args[0] if node.args else None
        if is_inquiry and isinstance(source, Node) and source.op == "get_attr":
            tensor = tensor_attribute(gm, source)
            if isinstance(tensor, Tensor):
                value = getattr(tensor, str(node.args[1]))
                for user in list(node.users):
                    _write_in(user, node, value)


def _write_in(user: Node, node: Node, value: Any) -> None:
    """Give `user` the value where it has `node` as an argument."""
    args, kwargs = map_arg((user.args, user.kwargs), lambda n: value if n is node else n)
    user.args, user.kwargs = tuple(args), dict(kwargs)


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
    if type(owner) not in classes or has_hooks(owner) or "forward" in vars(owner):
        return False  # their code is in the graph already
    weight = node.args[position]
    if not _is_parameter(gm, weight, owner.weight):
        return False
    if getattr(owner, "padding_mode", "zeros") != "zeros" or getattr(owner, "max_norm", None):
        return False  # their forward does more than this op
    target = names.target(path)
    names.made[target] = owner
    names.taken.add(path)
    source = node.args[1 if node.target is aten.embedding.default else 0]
    _replace_by_call(gm.graph, node, target, source)
    return True


def _restored(gm: GraphModule, names: "_Names", node: Node) -> bool:
    """Put a recurrent module back that made this call."""
    path = recurrent_owner(gm, names.module, node)
    if path is None:
        return False
    target = names.target(path)
    names.made[target] = names.module.get_submodule(path)
    names.taken.add(path)
    restore_recurrent(gm, node, target)
    return True


def _is_parameter(gm: GraphModule, node: Any, parameter: Any) -> bool:
    return (
        isinstance(node, Node) and node.op == "get_attr" and tensor_attribute(gm, node) is parameter
    )


def _make_linear(gm: GraphModule, names: "_Names", constants: Constants, node: Node) -> bool:
    operands = linear_operands(node)
    if operands is None:
        return False
    if operands.equation is not None:
        return _make_linear_of_einsum(gm, names, constants, node, operands)
    weight = constants.of(operands.weight)
    if weight is None or not isinstance(operands.input, Node) or constants.of(operands.input):
        return False
    matrix = _matrix(weight.value)
    if matrix is None or not weight.sources:
        return False
    matrix = matrix.t() if operands.is_transposed else matrix
    if operands.weight_scale != 1:
        matrix = matrix * operands.weight_scale
    out = matrix.shape[0]
    bias = constants.of(operands.bias)
    last, vector = node, None if bias is None else _bias(bias.value, out)
    if vector is not None:
        vector = vector if operands.bias_scale == 1 else vector * operands.bias_scale
    elif operands.bias is None:
        addition = _bias_addition(constants, node, out)
        if addition is not None:
            last, vector = addition
    call = _call_linear(gm, names, weight, matrix, vector, operands.input, node, last)
    if (
        operands.bias is not None and vector is None
    ):  # a bias that depends on the input, or another shape
        with gm.graph.inserting_after(call):
            add = gm.graph.call_function(
                torch.add, (call, operands.bias), {"alpha": operands.bias_scale}
            )
        _use_instead(call, add)
        add.meta = dict(call.meta)
    return True


def _make_grouped(gm: GraphModule, names: "_Names", constants: Constants, node: Node) -> bool:
    product = grouped_product(constants, node)
    if product is None:
        return False
    path = node.meta.get(MODULE_PATH)
    target = names.of(product.weight, product.matrices, None, path)
    _mark_read_only(gm, names, target, product.weight)
    mark_bare(gm, names.module, names.names.get(target, target), product.weight, product.matrices)
    names.made.setdefault(target, GroupedLinear.on(product.matrices))
    call = call_grouped(gm, node, target, product)
    call.meta = {key: value for key, value in node.meta.items() if key == MODULE_PATH}
    return True


def _mark_read_only(gm: GraphModule, names: "_Names", target: str, weight: Constant) -> None:
    """Note a layer whose weight is read by other code than its own."""
    owners = [user_name(gm, str(n.target)).rpartition(".")[0] for n in weight.sources]
    gm.meta.setdefault(READ_ONLY, []).extend((names.names.get(target, target), *owners))


def _make_linear_of_einsum(
    gm: GraphModule, names: "_Names", constants: Constants, node: Node, operands: LinearOperands
) -> bool:
    for source, other, swapped in (
        (operands.input, operands.weight, False),
        (operands.weight, operands.input, True),
    ):
        weight = constants.of(other)
        if weight is None or not weight.sources or constants.of(source):
            continue
        form = linear_form(str(operands.equation), weight.value, swapped=swapped)
        if form is None or not weight.value.is_floating_point():
            return False
        matrix, contracted, made = form
        with gm.graph.inserting_before(node):
            if contracted > 1:
                source = gm.graph.call_function(torch.flatten, (source, -contracted, -1))
        call = _call_linear(gm, names, weight, matrix, None, source, node, node)
        if len(made) > 1:
            with gm.graph.inserting_after(call):
                split = gm.graph.call_method("unflatten", (call, -1, tuple(made)))
            _use_instead(call, split)
        return True
    return False


def _matrix(weight: Tensor) -> Tensor | None:
    """The [.., ..] matrix that a weight is, also where it is repeated for each row of the batch."""
    if weight.ndim == 3 and weight.shape[0] and (weight.shape[0] == 1 or weight.stride(0) == 0):
        weight = weight[0]
    return weight if weight.ndim == 2 and weight.is_floating_point() else None


def _bias(value: Tensor, out: int) -> Tensor | None:
    """A constant that is added to [..., out], as a vector [out]; None where it is none."""
    if not value.is_floating_point() or value.numel() not in (1, out):
        return None
    if value.ndim and value.shape[-1] not in (1, out):
        return None
    return value if value.shape == (out,) else value.reshape(-1).expand(out).contiguous()


def _call_linear(
    gm: GraphModule,
    names: "_Names",
    weight: Constant,
    matrix: Tensor,
    bias: Tensor | None,
    source: Any,
    node: Node,
    last: Node,
) -> Node:
    path = node.meta.get(MODULE_PATH)
    target = names.of(weight, matrix, bias, path)
    is_read_elsewhere = names.names.get(target, target) != (path or ROOT)
    if is_read_elsewhere:
        _mark_read_only(gm, names, target, weight)
    if bias is None or is_read_elsewhere:
        mark_bare(gm, names.module, names.names.get(target, target), weight, matrix)
    names.made.setdefault(target, linear_around(matrix, bias))
    return _replace_by_call(gm.graph, last, target, source)


def _bias_addition(constants: Constants, node: Node, out: int) -> tuple[Node, Any] | None:
    """The addition of a constant [out] that is the only user of `node`."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    if not is_addition(user):
        return None
    left, right = user.args
    bias = constants.of(right if left is node else left)
    if bias is None or bias.value.shape != (out,) or not bias.value.is_floating_point():
        return None
    return user, bias.value


def _replace_by_call(graph: Graph, node: Node, target: str, source: Any) -> Node:
    with graph.inserting_before(node):
        call = graph.create_node("call_module", target, (source,))
    call.meta = {key: value for key, value in node.meta.items() if key == MODULE_PATH}
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    return call


class _Names:
    """Names for layers that are put back, or made of bare parameters."""

    def __init__(self, gm: GraphModule, module: nn.Module) -> None:
        self.gm, self.module = gm, module
        self.names: dict[str, str] = dict(gm.meta.get(NAMES_KEY, {}))
        self.made: dict[str, nn.Module] = {}
        self.targets: dict[str, str] = {}
        self.taken = {
            user_name(gm, str(n.target))
            for n in gm.graph.nodes
            if n.op == "call_module" or (n.op == "get_attr" and len(n.users) > 1)
        }
        self.given: dict[tuple[Any, ...], str] = {}
        self._kept: list[Tensor] = []  # alive, so that no identity is used twice

    def target(self, path: str) -> str:
        """The target of the user's module at `path`."""
        if path not in self.targets:
            known = [str(n.target) for n in self.gm.graph.nodes if n.op in ("call_module",)]
            same = next((t for t in known if user_name(self.gm, t) == path), None)
            target = same or target_of(path, {*self.names, *self.targets.values()} - {path})
            self.targets[path] = target
            if target != path:
                self.names[target] = path
        return self.targets[path]

    def of(self, weight: Constant, matrix: Tensor, bias: Any, path: str | None) -> str:
        """The target for a linear layer; the same layer gets the same name."""
        node = weight.last
        added = None if bias is None else (bias._cdata, bias.storage_offset())
        key = _identity(node), added, tuple(matrix.shape), matrix.stride()
        if key not in self.given:
            name = self._module_name(weight, path)
            number, free = 1, name
            while free in self.taken:
                number += 1
                free = f"{name}_{number}"
            self.taken.add(free)
            if bias is not None:
                self._kept.append(bias)
            self.given[key] = self.target(free)
        return self.given[key]

    def _module_name(self, weight: Constant, path: str | None) -> str:
        source = max(weight.sources, key=lambda n: tensor_attribute(self.gm, n).numel())
        suffix = ""
        chunk = _chunk_index(weight.last)
        if chunk is not None:
            index, count = chunk
            suffix = "_" + ("qkv"[index % 3] if count == 3 else str(index))
        owner, _, parameter = user_name(self.gm, str(source.target)).rpartition(".")
        if path and self._is_lent(path, parameter):
            owner = path  # a tied weight: the module that uses it, not the one that is named first
        if parameter != "weight":
            stem = parameter.removesuffix("_weight").removesuffix(".weight") + suffix
            return f"{owner}.{stem}" if owner else stem
        if not owner:
            return "weight" if ROOT in dict(self.module.named_children()) else ROOT
        return owner + suffix

    def _is_lent(self, path: str, parameter: str) -> bool:
        try:
            return isinstance(self.module.get_submodule(path), nn.Linear) and parameter == "weight"
        except AttributeError:
            return False


def _identity(node: Node) -> tuple[Any, ...]:
    """What is the same for nodes that compute the same constant in the same way."""
    if node.op == "get_attr":
        return (str(node.target),)
    arguments = [_identity(a) if isinstance(a, Node) else repr(a) for a in node.args]
    return (op_name(node), *arguments)


def _chunk_index(node: Node) -> tuple[int, int] | None:
    """`(index, count)` if the constant is, on the way to `node`, one of the chunks of another."""
    while node.op != "get_attr":
        source: Any = node.args[0] if node.args else None
        if not isinstance(source, Node):
            return None
        if op_name(node) == "getitem" and op_name(source) == "chunk" and len(source.args) > 1:
            index, count = node.args[1], source.args[1]
            return (index, count) if isinstance(index, int) and isinstance(count, int) else None
        node = source
    return None
