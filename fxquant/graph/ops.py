"""The one table of what ops do: to support an op, add a row and a test model.

A row is found by the op's short name, which is the same for a function of torch, a method of
tensors, an operator of Python and the overloads of `aten`: `torch.add`, `x.add(y)`, `x + y` and
`aten.add.Tensor` are all `add`. What a row says holds for all of them:

- `view`: the result may lie in the memory of the first argument
- `moves`: the result holds all elements of the first argument, once, and nothing else
- `keeps`: in evaluation mode the result is the first argument, element by element, same order
- `cast`: changes the dtype or device and nothing else
- `adds`: adds or subtracts its two operands
- `random`: draws random numbers
- `product`: how its weight is used, for ops that multiply with one: `"linear"` and friends have a
  rule below that finds the operands; the other kinds are counted, not quantized
- `lookup`: reads rows of its weight
- `scale`: how a positive scale of channels passes; see `scale_rules`

Whether an op writes into memory is not in the table: names and schemas of torch say it.
"""

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class Op:
    """A row of the table; the docstring of this file says what each column means."""

    name: str
    view: bool = False
    moves: bool = False
    keeps: bool = False
    cast: bool = False
    adds: bool = False
    random: bool = False
    product: str | None = None
    lookup: bool = False
    scale: str | None = None


def _rows(names: str, **columns: Any) -> list[Op]:
    return [Op(name, **columns) for name in names.split()]


_TABLE: tuple[Op, ...] = (
    # rearrangements: all elements, once
    *_rows("view reshape flatten unflatten", view=True, moves=True, keeps=True, scale="move"),
    *_rows("_unsafe_view", moves=True, keeps=True, scale="move"),
    *_rows("transpose permute unsqueeze squeeze t numpy_T", view=True, moves=True, scale="move"),
    *_rows("swapaxes swapdims movedim", view=True, moves=True, scale="move"),
    *_rows("contiguous", view=True, moves=True, keeps=True, scale="homogeneous"),
    *_rows("detach alias", view=True, moves=True, keeps=True, scale="homogeneous"),
    *_rows("clone lift_fresh_copy", keeps=True, scale="homogeneous"),
    # parts and repetitions
    *_rows("chunk split unbind split_with_sizes tensor_split", view=True, scale="split"),
    *_rows("expand slice select getitem narrow expand_as", view=True, scale="move"),
    *_rows("repeat_interleave index_select getattr", scale="move"),
    *_rows("diagonal unfold view_as as_strided real imag view_as_real", view=True),
    # dtype and device only
    *_rows("to float half bfloat16 double type type_as", view=True, cast=True, scale="homogeneous"),
    *_rows("_to_copy", cast=True, scale="homogeneous"),
    # elementwise
    *_rows("relu relu_ leaky_relu neg abs", scale="homogeneous"),
    *_rows("dropout dropout1d dropout2d dropout3d alpha_dropout", keeps=True, random=True,
           scale="homogeneous"),
    *_rows("feature_alpha_dropout feature_dropout native_dropout", random=True),
    *_rows("mul imul mul_ multiply", scale="product"),
    *_rows("div div_ truediv divide itruediv", scale="quotient"),
    *_rows("add iadd add_ __add__ __iadd__", adds=True, scale="sum"),
    *_rows("sub isub sub_ subtract", scale="sum"),
    *_rows("layer_norm rms_norm", scale="norm"),
    *_rows("size sym_size dim ndimension numel sym_numel len is_floating_point get_device",
           scale="inquiry"),
    *_rows("expect_constant", scale="inquiry"),
    # products with a weight
    *_rows("linear", product="linear"),
    *_rows("matmul", product="linear", scale="matmul"),
    *_rows("__matmul__ __rmatmul__ mm addmm einsum baddbmm", product="linear"),
    *_rows("bmm", product="linear", scale="matmul"),
    *_rows("scaled_dot_product_attention", scale="attention"),
    *_rows("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution "
           "_convolution conv_tbc", product="convolution"),
    *_rows("grouped_matmul grouped_mm _grouped_mm scaled_grouped_mm", product="expert"),
    *_rows("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
           product="recurrent"),
    *_rows("bilinear tensordot addbmm mv addmv dot inner chain_matmul multi_dot",
           product="other product"),
    *_rows("multi_head_attention_forward _native_multi_head_attention "
           "_transformer_encoder_layer_fwd", product="packed attention"),
    *_rows("embedding embedding_bag _embedding_bag", lookup=True),
    # random numbers
    *_rows("rand randn randint randperm rand_like randn_like randint_like normal normal_ "
           "bernoulli bernoulli_ multinomial poisson uniform_ exponential_ geometric_ cauchy_ "
           "log_normal_ random_ rrelu rrelu_ rrelu_with_noise gumbel_softmax dropout_ "
           "fractional_max_pool2d fractional_max_pool3d binomial", random=True),
)  # fmt: skip

OPS: dict[str, Op] = {row.name: row for row in _TABLE}

# The same column for torch's modules: their parameters that are factors of a product, by kind.
_MODULES: tuple[tuple[type[nn.Module], tuple[str, ...], str], ...] = (
    (nn.Linear, ("weight",), "linear"),
    (nn.Bilinear, ("weight",), "other product"),
    (nn.modules.conv._ConvNd, ("weight",), "convolution"),
    (nn.RNNBase, ("weight_",), "recurrent"),
    (nn.RNNCellBase, ("weight_",), "recurrent"),
    (nn.MultiheadAttention, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
     "packed attention"),
)  # fmt: skip


def module_product(module: nn.Module) -> tuple[str, list[str]] | None:
    """`(kind, names of the parameters)` of a module of torch's that multiplies, or None."""
    for cls, prefixes, kind in _MODULES:
        if isinstance(module, cls):
            names = [
                n for n, p in module._parameters.items() if p is not None and n.startswith(prefixes)
            ]
            return kind, names
    return None


_UNKNOWN = Op("")
_IN_PLACE_OPERATORS = frozenset(
    [
        "iadd",
        "iand",
        "iconcat",
        "ifloordiv",
        "ilshift",
        "imatmul",
        "imod",
        "imul",
        "ior",
        "ipow",
        "irshift",
        "isub",
        "itruediv",
        "ixor",
        "setitem",
        "delitem",
    ]
)
_IN_PLACE_METHODS = frozenset(f"__{name}__" for name in _IN_PLACE_OPERATORS)


def kind_of_product(module: nn.Module) -> str | None:
    """What kind of product a module of torch's multiplies its weight in, or None."""
    return next((kind for cls, _, kind in _MODULES if isinstance(module, cls)), None)


def op_name(node: Node) -> str:
    """The op's short name, the same for functions, methods and their aten forms.

    >>> graph = torch.fx.Graph()
    >>> op_name(graph.call_function(torch.ops.aten.mul.Tensor, (graph.placeholder("x"), 2)))
    'mul'
    """
    if node.op not in ("call_function", "call_method"):
        return ""
    return target_name(node.target)


def target_name(target: Any) -> str:
    """The short name of a function, an overload of aten, or a method given as text."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).split("::")[1]
    return str(getattr(target, "__name__", target)).split(".")[0]


def op_of(node: Node) -> Op:
    """The row of the node's op; a row that says nothing where the table has none."""
    name = op_name(node)
    return OPS.get(name) or replace(_UNKNOWN, name=name)


def is_view(node: Node) -> bool:
    """Whether the op's result mostly lies in the memory of its first argument."""
    return op_of(node).view


def is_rearrangement(node: Node) -> bool:
    """Whether the op only moves all elements of its first argument."""
    return op_of(node).moves


def is_addition(node: Node) -> bool:
    """Whether `node` adds two operands without further options."""
    return op_of(node).adds and not node.kwargs and len(node.args) == 2


def is_random(node: Node) -> bool:
    """Whether the op draws random numbers, as called here."""
    if isinstance(node.target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded not in node.target.tags:
            return False
    elif not op_of(node).random:
        return False
    if op_of(node).keeps:  # dropout, which does nothing unless it trains
        return bool(_argument(node, "training", _argument(node, "train", False)))
    return True


def writes(node: Node, gm: GraphModule | None = None) -> bool:
    """Whether the node changes memory that was there before: an argument, or a module's state.

    Args:
        node: any node.
        gm: its graph module; without it, modules count as writing nothing.
    """
    match node.op:
        case "call_method":
            return _is_writing_name(str(node.target)) or node.kwargs.get("out") is not None
        case "call_function":
            return _function_writes(node)
        case "call_module" if gm is not None:
            return module_writes(gm.get_submodule(str(node.target)))
    return False


def module_writes(module: nn.Module) -> bool:
    """Whether a call of `module` may change its argument or its own state.

    Of torch's own modules only those with `inplace=True` do, in evaluation mode; what other classes
    do is not known.
    """
    return any(
        getattr(part, "inplace", False) is True
        or is_foreign(part)
        or bool(part._forward_hooks or part._forward_pre_hooks)
        for part in module.modules()
    )


def is_foreign(module: nn.Module) -> bool:
    """Whether `module` runs code that fxquant does not know: it is neither torch's nor its own."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return not type(module).__module__.startswith(("torch.nn.", "fxquant."))


def calls_foreign_functions(gm: GraphModule) -> bool:
    """Whether the graph calls functions of other libraries, whose code it cannot hold."""
    known = ("torch", "fxquant", "_operator", "math", "builtins")
    modules = {
        str(getattr(node.target, "__module__", None) or "torch")
        for node in gm.graph.nodes
        if node.op == "call_function"
    }
    return not all(module.split(".")[0] in known for module in modules)


def _function_writes(node: Node) -> bool:
    target: Any = node.target
    if op_name(node) in ("batch_norm", "instance_norm") and _updates_statistics(node):
        return True
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    name = target_name(target)
    if (
        getattr(target, "__module__", None) == operator.__name__
        or target in vars(operator).values()
    ):
        return name in _IN_PLACE_OPERATORS
    if node.kwargs.get("out") is not None or _argument(node, "inplace", False) is True:
        return True
    return _is_writing_name(name)


def _updates_statistics(node: Node) -> bool:
    """Whether a norm writes into running statistics that it was given."""
    has_statistics = _argument(node, "running_mean", None) is not None
    trains = _argument(node, "training", False) or _argument(node, "use_input_stats", False)
    return has_statistics and bool(trains)


def _is_writing_name(name: str) -> bool:
    return name in _IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__"))


def _argument(node: Node, name: str, default: Any) -> Any:
    """The value of the argument called `name`, by keyword or position."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = _parameter_names(node.target)
    if name in names and names.index(name) < len(node.args):
        return node.args[names.index(name)]
    return default


@cache
def _parameter_names(target: Any) -> tuple[str, ...]:
    if isinstance(target, torch._ops.OpOverload):
        return tuple(a.name for a in target._schema.arguments)
    try:
        return tuple(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a builtin without a signature, or a method's name
        return ()


def writes_before(gm: GraphModule) -> dict[Node, int]:
    """For each node, how many nodes that write come before it.

    A value that two nodes read may be taken as one only where this number is the same for both.
    """
    found, count = {}, 0
    for node in gm.graph.nodes:
        found[node] = count
        count += writes(node, gm)
    return found


def has_effects(gm: GraphModule) -> bool:
    """Whether running a part of the graph again may give another result than running all of it.

    That is so where a node writes into memory or draws random numbers.
    """
    return any(writes(node, gm) or is_random(node) for node in gm.graph.nodes)


def remove_unused(gm: GraphModule) -> None:
    """Erase nodes whose value nobody uses, unless they write, draw, or check something."""
    for node in reversed(gm.graph.nodes):
        is_value = node.op in ("get_attr", "call_function", "call_method", "call_module")
        if is_value and not node.users and not node.is_impure() and not _has_effect(node, gm):
            gm.graph.erase_node(node)


def _has_effect(node: Node, gm: GraphModule) -> bool:
    return writes(node, gm) or is_random(node)


LinearRule = Callable[..., "LinearOperands | None"]


@dataclass(frozen=True)
class LinearOperands:
    """The arguments of an op that is a linear layer: input · weightᵀ + bias.

    Attributes:
        input: the node of the activations.
        weight: the node of the weight.
        bias: the node of the bias, or None.
        is_transposed: whether the weight is laid out [in, out].
        weight_scale: a factor of the weight (`alpha` of addmm).
        bias_scale: a factor of the bias (`beta`).
        equation: of an einsum; it then says how the operands lie, instead of `is_transposed`.
    """

    input: Any
    weight: Any
    bias: Any = None
    is_transposed: bool = False
    weight_scale: float = 1.0
    bias_scale: float = 1.0
    equation: str | None = None


def _linear(input: Any, weight: Any, bias: Any = None) -> LinearOperands:
    return LinearOperands(input, weight, bias)


def _matmul(input: Any, other: Any) -> LinearOperands:
    return LinearOperands(input, other, is_transposed=True)


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> LinearOperands:
    return LinearOperands(mat1, mat2, input, True, float(alpha), float(beta))


def _einsum(equation: Any, *operands: Any) -> LinearOperands | None:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    return LinearOperands(*operands, equation=equation.replace(" ", ""))


_LINEAR_RULES: dict[str, LinearRule] = {
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "addmm": _addmm,
    "baddbmm": lambda input, batch1, batch2, **scales: _addmm(input, batch1, batch2, **scales),
    "einsum": _einsum,
}


def linear_operands(node: Node) -> LinearOperands | None:
    """The operands of `node` if the table has its op and its arguments fit, else None."""
    rule = _LINEAR_RULES.get(op_name(node))
    if rule is None or op_of(node).product != "linear":
        return None
    try:
        return rule(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # an overload with other arguments, such as `path=`
        return None


def transposed_source(node: Any) -> Node | None:
    """The node that `node` transposes (its last two dimensions of two), or None."""
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
        return None
    source, name = node.args[0], op_name(node)
    rest: list[Any] = list(node.args[1:])
    if name == "getattr":
        return source if rest in (["T"], ["mT"]) else None
    if name in ("t", "numpy_T"):
        return source
    if name in ("transpose", "swapaxes", "swapdims"):
        return source if sorted(rest) in ([0, 1], [-2, -1]) else None
    if name == "permute":
        order = rest[0] if len(rest) == 1 else rest
        return source if list(order) in ([1, 0], [-1, -2]) else None
    return None
