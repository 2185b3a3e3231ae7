"""The one table of what ops do: to support an op, add a row and a test model.

A row is found by the op's short name, which is the same for a function of torch, a method of
tensors, an operator of Python and the overloads of `aten`: `torch.add`, `x.add(y)`, `x + y` and
`aten.add.Tensor` are all `add`. What a row says holds for all of them:

- `view`: the result may lie in the memory of the first argument
- `moves`: the result holds all elements of the first argument, once, and nothing else
- `keeps`: in evaluation mode the result is the first argument, element by element, same order
- `cast`: changes the dtype or device and nothing else
- `adds`: adds or subtracts its two operands
- `affine`: multiplies each channel (dimension 1) by a constant and adds one, in evaluation mode
- `random`: draws random numbers
- `product`: how its weight is used, for ops that multiply with one: `"linear"` and friends have a
  rule in `linear_operands.py` that finds the operands; the others are counted, not quantized
- `lookup`: reads rows of its weight
- `scale`: how a positive scale of channels passes; see `scale_rules`

Whether an op writes into memory is not in the table: see `effects.py`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fxquant.modules.grouped_linear import GroupedLinear


@dataclass(frozen=True)
class Op:
    """A row of the table; the docstring of this file says what each column means."""

    name: str
    view: bool = False
    moves: bool = False
    keeps: bool = False
    cast: bool = False
    adds: bool = False
    affine: bool = False
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
    *_rows("swapaxes swapdims movedim moveaxis adjoint mT", view=True, moves=True, scale="move"),
    *_rows("contiguous", view=True, moves=True, keeps=True, scale="homogeneous"),
    *_rows("detach alias", view=True, moves=True, keeps=True, scale="homogeneous"),
    *_rows("clone lift_fresh_copy", keeps=True, scale="homogeneous"),
    # parts and repetitions
    *_rows("chunk split unbind split_with_sizes tensor_split", view=True, scale="split"),
    *_rows("expand slice select getitem narrow expand_as", view=True, scale="move"),
    *_rows("repeat_interleave index_select getattr", scale="move"),
    *_rows("diagonal unfold view_as as_strided strided_view real imag view_as_real", view=True),
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
    *_rows("batch_norm", affine=True),
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
           "fractional_max_pool2d fractional_max_pool3d binomial seed_random", random=True),
)  # fmt: skip


OPS: dict[str, Op] = {row.name: row for row in _TABLE}


# The same column for torch's modules: their parameters that are factors of a product, by kind.
_MODULES: tuple[tuple[type[nn.Module], tuple[str, ...], str], ...] = (
    (nn.Linear, ("weight",), "linear"),
    (GroupedLinear, ("weight",), "expert"),
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


def is_own(target: Any) -> bool:
    """Whether it is one of fxquant's functions for graphs."""
    return str(getattr(target, "__module__", "")).startswith("fxquant.")


def op_of(node: Node) -> Op:
    """The row of the node's op; a row that says nothing where the table has none."""
    name = op_name(node)
    return OPS.get(name) or replace(_UNKNOWN, name=name)


def is_inquiry(node: Node) -> bool:
    """Whether the op asks for the shape, dtype or device of its first argument, not its values."""
    if op_name(node) == "getattr":
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return op_of(node).scale == "inquiry"


def is_view(node: Node) -> bool:
    """Whether the op's result mostly lies in the memory of its first argument."""
    return op_of(node).view


def is_rearrangement(node: Node) -> bool:
    """Whether the op only moves all elements of its first argument."""
    return op_of(node).moves


def is_addition(node: Node) -> bool:
    """Whether `node` adds two operands without further options."""
    return op_of(node).adds and not node.kwargs and len(node.args) == 2
