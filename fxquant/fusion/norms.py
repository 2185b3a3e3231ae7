"""A norm, with the addition before it, becomes one op.

before: `s = x + y`, `z = self.norm(s)`
after:  `z = norm(x, y, weight, bias, eps)`, or, where the sum is read again,
        `s, z = add_and_norm(x, y, weight, bias, eps)`

Norms are LayerNorm and RMSNorm over the last dimension, as modules or functions, and the RMSNorm
that language models write out in seven steps. RMSNorm is fused also where nothing is added before
it: torch computes its own in several steps, too.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.fusion.matching import Formula, Given, Value, match
from fxquant.graph.effects import writes_before
from fxquant.graph.layers import has_hooks
from fxquant.graph.ops import is_addition, op_name
from fxquant.kernels.norm import add_and_norm, norm

_X = Value("x")
_SQUARES = Formula("mean", Formula("pow", _X, 2), -1, True)
_ROOT = Formula("rsqrt", Formula("add", _SQUARES, Given("eps")))
_ROUNDED = Formula("to", Formula("mul", _X, _ROOT), Given("dtype"))
RMS = Formula("mul", Value("weight"), _ROUNDED)
_READS = 2  # of x, in the formula
_MODULES: dict[type[nn.Module], str] = {nn.LayerNorm: "layer", nn.RMSNorm: "rms"}
# By the name of the op: the kind, the names of arguments, and eps where none is given. That of an
# RMSNorm depends on the dtype then.
_ARGUMENTS: dict[str, tuple[str, tuple[str, ...], float | None]] = {
    "layer_norm": (
        "layer", ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"), 1e-5,
    ),
    "rms_norm": ("rms", ("input", "normalized_shape", "weight", "eps"), None),
}  # fmt: skip


@dataclass(frozen=True)
class _Norm:
    """What a node norms, and how."""

    source: Node
    weight: Node | str  # a value, or the target of a parameter
    bias: Node | str | None
    eps: float
    is_read_again: bool  # whether the source is needed for something else
    kind: str = "layer"
    dtype: torch.dtype | None = None


def fuse_norms(gm: GraphModule) -> None:
    """Fuse each LayerNorm of a sum, and each RMSNorm."""
    writes = writes_before(gm)
    for node in list(gm.graph.nodes):
        found = _norm_of(gm, node)
        if found is None:
            continue
        total = found.source
        if _is_sum(total) and writes[total] == writes[node] and _may_move(found):
            _fuse_sum(gm, node, found)
        elif found.kind == "rms":
            rest = _parameters(gm, node, found)
            _become(node, norm, (found.source, None, *rest))


def _fuse_sum(gm: GraphModule, node: Node, found: _Norm) -> None:
    total = found.source
    operands = total.args[:2]
    if not found.is_read_again:
        _become(node, norm, (*operands, *_parameters(gm, node, found)))
        return
    with gm.graph.inserting_before(total):
        arguments = (*operands, *_parameters(gm, total, found))
        pair = gm.graph.call_function(add_and_norm, arguments)
    _become(total, operator.getitem, (pair, 0))
    _become(node, operator.getitem, (pair, 1))


def _become(node: Node, function: Any, arguments: tuple[Any, ...]) -> None:
    node.op, node.target, node.args, node.kwargs = "call_function", function, arguments, {}


def _parameters(gm: GraphModule, before: Node, found: _Norm) -> tuple[Any, ...]:
    """Weight, bias, eps, kind and dtype as arguments; parameters of a module are read anew."""
    tensors = []
    with gm.graph.inserting_before(before):
        for tensor in (found.weight, found.bias):
            tensors.append(gm.graph.get_attr(tensor) if isinstance(tensor, str) else tensor)
    rest = () if found.kind == "layer" else (found.kind, found.dtype)
    return (*tensors, found.eps, *rest)


def _may_move(found: _Norm) -> bool:
    """Whether the norm can be computed where its source is: parameters can be read anywhere."""
    tensors = (found.weight, found.bias)
    return not found.is_read_again or not any(isinstance(t, Node) for t in tensors)


def _is_sum(node: Node) -> bool:
    """Whether it adds two values, and changes neither."""
    is_plain = is_addition(node) and op_name(node) == "add"
    return is_plain and all(isinstance(a, Node) for a in node.args)


def _norm_of(gm: GraphModule, node: Node) -> _Norm | None:
    if node.op == "call_module":
        return _module(gm, node)
    if op_name(node) in _ARGUMENTS:
        return _function(node)
    return _written_out(node)


def _module(gm: GraphModule, node: Node) -> _Norm | None:
    module: Any = gm.get_submodule(str(node.target))
    kind = _MODULES.get(type(module))
    if kind is None or has_hooks(module) or node.kwargs or len(node.args) != 1:
        return None
    if len(module.normalized_shape) != 1 or module.weight is None or module.eps is None:
        return None
    bias = None if getattr(module, "bias", None) is None else f"{node.target}.bias"
    source = node.args[0]
    if not isinstance(source, Node):
        return None
    is_read_again = len(source.users) > 1
    return _Norm(source, f"{node.target}.weight", bias, module.eps, is_read_again, kind)


def _function(node: Node) -> _Norm | None:
    kind, names, eps = _ARGUMENTS[op_name(node)]
    given: dict[str, Any] = {"weight": None, "bias": None, "eps": eps}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    source, weight, bias = given.get("input"), given["weight"], given["bias"]
    is_exact = (
        isinstance(source, Node)
        and isinstance(weight, Node)
        and (bias is None or isinstance(bias, Node))
        and isinstance(given["normalized_shape"], list | tuple)
        and len(given["normalized_shape"]) == 1
        and isinstance(given["eps"], float)
    )
    if not is_exact:
        return None
    assert isinstance(source, Node)  # for type checkers
    assert isinstance(weight, Node)
    is_read_again = len(source.users) > 1
    return _Norm(source, _parameter(weight), _parameter(bias), given["eps"], is_read_again, kind)


def _written_out(node: Node) -> _Norm | None:
    found = match(node, RMS)
    if found is None or not isinstance(found["eps"], float):
        return None
    source, dtype = _before_float32(found["x"]), found["dtype"]
    if isinstance(dtype, Node):
        if dtype.target is not getattr or dtype.args != (source, "dtype"):
            return None
        dtype = None
    elif not isinstance(dtype, torch.dtype):
        return None
    others = set(found["x"].users) | (set(source.users) - {found["x"]})
    is_read_again = len(others) > _READS + isinstance(found["dtype"], Node)
    weight, eps = _parameter(found["weight"]), found["eps"]
    return _Norm(source, weight, None, eps, is_read_again, "rms", dtype)


def _parameter(node: Node | None) -> Any:
    """The target of a node that reads a parameter; any other node itself."""
    return str(node.target) if node is not None and node.op == "get_attr" else node


def _before_float32(node: Node) -> Node:
    """What a conversion to float32 converts, which the norm does by itself."""
    is_cast = op_name(node) == "to" and node.args[1:] == (torch.float32,) and not node.kwargs
    source = node.args[0]
    return source if is_cast and isinstance(source, Node) else node
