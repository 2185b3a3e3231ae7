"""What the graph of a file may call: the column "may be in a file" of the table of ops.

A file is not trusted, so this is a list of what is allowed; whatever is not named here is refused
when a model is saved and when it is loaded. Names are short names, as in `ops`: one row stands for
a function of torch, a method of tensors and the overloads of `aten`. Listed is what computes
tensors from tensors and checks its arguments itself. Not listed, though models use some of it:

- what changes the process: grad mode, seeds, threads, default dtypes, registrations, files
- what can leave the memory of its tensors: `as_strided`, `set_`, `resize_`, storage and pointers,
  products of quantized integers, `embedding_bag`, recurrent ops on loose weights, sparse layouts
- private ops, but for the few that exported programs hold
"""

import inspect
import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.fx.node import map_arg

from fxquant.graph.ops import is_own, target_name


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Ops on tensors, under their short names.
TENSOR_OPS = _words(
    # rearranging, joining, splitting
    "view reshape flatten unflatten transpose permute unsqueeze squeeze t numpy_T adjoint moveaxis "
    "mT mH matrix_H "
    "swapaxes swapdims movedim contiguous detach alias clone lift_fresh_copy ravel view_as "
    "reshape_as expand expand_as broadcast_to broadcast_tensors chunk split unbind tensor_split "
    "split_with_sizes hsplit vsplit dsplit slice select narrow diagonal unfold unsafe_chunk "
    "unsafe_split cat concat concatenate stack hstack vstack dstack column_stack row_stack tile "
    "repeat repeat_interleave roll flip fliplr flipud rot90 tril triu tril_indices triu_indices "
    "diag diag_embed diagflat meshgrid cartesian_prod combinations block_diag atleast_1d "
    "atleast_2d atleast_3d real imag view_as_real view_as_complex complex polar conj resolve_conj "
    "resolve_neg conj_physical slice_scatter select_scatter diagonal_scatter "
    "_conj _unsafe_view _reshape_copy view_copy expand_copy permute_copy "
    # dtype and device
    "to float half bfloat16 double long int short bool byte char type_as cpu cuda _to_copy "
    "cfloat cdouble is_floating_point is_complex is_same_size size sym_size dim ndimension numel "
    "nelement sym_numel sym_stride stride get_device is_contiguous "
    "element_size is_nonzero item tolist "
    # elementwise
    "abs absolute neg negative positive sign sgn signbit relu relu6 leaky_relu prelu elu selu celu "
    "gelu silu mish hardtanh hardswish hardsigmoid hardshrink softshrink tanhshrink threshold "
    "softplus softsign logsigmoid glu sigmoid tanh sin cos tan asin acos atan arcsin arccos arctan "
    "atan2 arctan2 sinh cosh asinh acosh atanh arcsinh arccosh arctanh sinc exp exp2 expm1 log "
    "log2 log10 log1p logit logaddexp logaddexp2 xlogy sqrt rsqrt square pow float_power "
    "reciprocal ceil floor round trunc fix frac clamp clip clamp_min clamp_max erf erfc erfinv "
    "lgamma digamma i0 i1 i0e i1e expit log_ndtr ndtr entr mul multiply div divide true_divide "
    "floor_divide remainder fmod add sub subtract rsub addcmul addcdiv lerp maximum minimum fmax "
    "fmin hypot copysign heaviside nextafter ldexp frexp where nan_to_num deg2rad rad2deg gcd lcm "
    "isnan isinf isfinite isposinf isneginf isreal isclose allclose equal eq ne lt le gt ge "
    "not_equal less less_equal greater greater_equal logical_and logical_or logical_not "
    "logical_xor bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift "
    "bitwise_right_shift masked_fill angle "
    # reductions, scans, sorting
    "sum mean prod nansum nanmean std var std_mean var_mean amax amin aminmax max min argmax "
    "argmin all any norm logsumexp cumsum cumprod cummax cummin logcumsumexp median nanmedian mode "
    "quantile nanquantile kthvalue topk sort argsort msort count_nonzero diff trapezoid trapz "
    "vector_norm matrix_norm renorm dist cdist pairwise_distance cosine_similarity pdist softmax "
    "log_softmax softmin _softmax _log_softmax normalize unique unique_consecutive _unique2 "
    "unique_dim histc bincount searchsorted bucketize sum_to_size "
    # indexing
    "index index_select gather take take_along_dim scatter scatter_add scatter_reduce index_add "
    "index_copy index_fill index_put masked_select masked_scatter nonzero argwhere "
    "embedding one_hot _unsafe_index _unsafe_index_put _unsafe_masked_index isin "
    # products
    "linear matmul mm bmm addmm baddbmm addbmm einsum mv addmv dot vdot inner outer ger addr "
    "tensordot kron bilinear chain_matmul multi_dot cross matrix_power conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d convolution conv_tbc "
    "scaled_dot_product_attention "
    # norms, pools, images, sound
    "layer_norm rms_norm group_norm batch_norm instance_norm local_response_norm avg_pool1d "
    "avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices "
    "max_pool3d_with_indices max_pool1d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d "
    "lp_pool2d pad constant_pad_nd reflection_pad1d reflection_pad2d "
    "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d interpolate upsample "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa grid_sample grid_sampler "
    "affine_grid pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle fold "
    "im2col col2im fft ifft rfft irfft hfft ihfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn "
    "fftfreq rfftfreq fftshift ifftshift stft istft "
    # linear algebra
    "det logdet slogdet inv inverse solve solve_triangular cholesky qr matrix_exp trace "
    "matrix_transpose "
    # losses
    "mse_loss l1_loss smooth_l1_loss huber_loss cross_entropy nll_loss kl_div "
    "binary_cross_entropy binary_cross_entropy_with_logits "
    # random numbers and dropout
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout "
    "native_dropout rand randn randint randperm rand_like randn_like randint_like normal bernoulli "
    "multinomial gumbel_softmax rrelu uniform exponential "
    # making tensors
    "arange zeros ones full empty eye linspace logspace tensor scalar_tensor as_tensor zeros_like "
    "ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor "
    "hann_window hamming_window blackman_window kaiser_window bartlett_window "
    # checks that exported programs hold
    "_is_all_true _is_any_true _assert_tensor_metadata _assert_scalar _assert_async _assert "
    "sym_int sym_float sym_max sym_min sym_not sym_ite sym_sqrt sym_sum "
    "_sym_sqrt _assert_is_none "
    "sym_constrain_range sym_constrain_range_for_size"
)

# Ops that write into their first argument or change its shape; the tensor checks that itself.
WRITING_OPS = _words(
    "add_ sub_ mul_ div_ pow_ remainder_ fmod_ floor_divide_ neg_ abs_ exp_ log_ sqrt_ rsqrt_ "
    "reciprocal_ square_ sin_ cos_ tanh_ sigmoid_ relu_ leaky_relu_ elu_ selu_ celu_ silu_ "
    "mish_ relu6_ hardtanh_ hardswish_ hardsigmoid_ threshold_ clamp_ clamp_min_ clamp_max_ "
    "clip_ round_ floor_ ceil_ trunc_ frac_ sign_ erf_ lerp_ addcmul_ addcdiv_ addmm_ "
    "baddbmm_ addbmm_ addmv_ fill_ zero_ copy_ masked_fill_ masked_scatter_ index_put_ "
    "index_add_ index_copy_ index_fill_ index_reduce_ scatter_ scatter_add_ scatter_reduce_ "
    "eq_ ne_ lt_ le_ gt_ ge_ logical_and_ logical_or_ logical_not_ logical_xor_ bitwise_and_ "
    "bitwise_or_ bitwise_xor_ bitwise_not_ nan_to_num_ tril_ triu_ cumsum_ cumprod_ squeeze_ "
    "unsqueeze_ transpose_ t_ swapaxes_ swapdims_ multiply_ divide_ subtract_ true_divide_ "
    "detach_ dropout_ alpha_dropout_ feature_dropout_ fill_diagonal_ bernoulli_ uniform_ "
    "normal_ exponential_ random_ geometric_ cauchy_ log_normal_ rrelu_ renorm_ _foreach_mul_ "
    "_foreach_add_ _foreach_sub_ _foreach_div_"
)
# Python's operators as methods of a tensor.
MAGIC_METHODS = frozenset(
    f"__{name}__"
    for name in _words(
        "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv floordiv rfloordiv "
        "mod rmod pow rpow matmul rmatmul neg pos abs invert and rand or ror xor rxor lshift "
        "rshift eq ne lt le gt ge getitem setitem len bool int float index contains iand ior ixor "
        "div rdiv"
    )
)
OPERATORS = _words(
    "add sub mul truediv floordiv mod pow matmul neg pos abs invert inv and_ or_ xor lshift "
    "rshift eq ne lt le gt ge not_ truth is_ is_not index getitem setitem contains concat "
    "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift "
    "iconcat"
)
MATH = _words(
    "ceil floor sqrt exp log log2 log10 log1p expm1 pow sin cos tan asin acos atan atan2 sinh "
    "cosh tanh trunc fabs fmod gcd isfinite isinf isnan isclose copysign hypot prod fsum "
    "degrees radians erf erfc"
)
# What `getattr` reads of a tensor: nothing of it is code, a pointer or a storage.
ATTRIBUTES = _words(
    "shape dtype device ndim T mT H mH real imag itemsize nbytes layout data is_cuda is_cpu "
    "is_meta requires_grad type index values indices eigenvalues eigenvectors U S V Vh Q R L "
    "D P LU pivots info sign logdet logabsdet solution residuals rank singular_values hist "
    "bin_edges mantissa exponent counts inverse_indices"
)
_SPACES = (torch, F, torch._C._nn, torch.linalg, torch.fft, torch.special, torch.functional)


_PYTHON: dict[str, Any] = {
    "getattr": getattr, "len": len, "abs": abs, "min": min, "max": max, "int": int, "float": float,
    "bool": bool, "round": round, "sum": sum, "pow": pow,
}  # fmt: skip
# Memory that nobody wrote could hold anything, such as a boolean that is neither 0 nor 1.
_WRITTEN = {"empty": "zeros", "empty_like": "zeros_like", "new_empty": "new_zeros"}
# What may be given the dtype of a tensor: above all not `view`.
DTYPE_READERS = _words(
    "to eq ne is_ is_not expect_constant dtype_limit zeros ones full empty arange tensor as_tensor "
    "linspace zeros_like ones_like full_like empty_like rand_like randn_like rand randn "
    "new_zeros new_ones new_full new_empty new_tensor sum mean prod cumsum softmax "
    "log_softmax normalize eye linear"
)


@cache
def saved_functions() -> dict[str, Callable[..., Any]]:
    """Every allowed function of torch and Python by its full name."""
    found: dict[str, Callable[..., Any]] = {}
    for space in _SPACES:
        for name in sorted(TENSOR_OPS | WRITING_OPS):
            value = getattr(space, name, None)
            if callable(value) and not isinstance(value, type):
                found[f"{space.__name__}.{name}"] = value
    for module, names in ((operator, OPERATORS), (math, MATH)):
        found |= {f"{module.__name__}.{name}": getattr(module, name) for name in sorted(names)}
    found |= {f"builtins.{name}": function for name, function in _PYTHON.items()}
    own = torch.fx._symbolic_trace._assert_is_none
    found[f"{own.__module__}.{own.__name__}"] = own
    return found


@cache
def saved_methods() -> frozenset[str]:
    """Every allowed method of a tensor."""
    names = TENSOR_OPS | WRITING_OPS | MAGIC_METHODS
    return frozenset(name for name in names if callable(getattr(torch.Tensor, name, None)))


def saved_overload(packet: str, overload: str) -> Any:
    """The overload `aten.packet.overload` if it may be in a file, else None."""
    name = packet
    for prefix in ("linalg_", "fft_", "special_"):
        name = name.removeprefix(prefix)
    if name not in TENSOR_OPS | WRITING_OPS | MAGIC_METHODS or not overload.isidentifier():
        return None
    op = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if not isinstance(op, torch._ops.OpOverload):
        return None
    return None if any(a.is_out for a in op._schema.arguments) else op


def fault_of_call(node: Node) -> str | None:
    """What is wrong with the arguments of a call that may be in a file, or None."""
    target, name = node.target, target_name(node.target)
    values = (*node.args, *node.kwargs.values())
    if target is getattr:
        is_read = len(node.args) == 2 and not node.kwargs and node.args[1] in ATTRIBUTES
        return None if is_read else f"a read of {node.args[1:]!r}"
    if not is_own(target):  # else a keyword may be the name of an output
        if node.kwargs.get("out") is not None or node.kwargs.get("generator") is not None:
            return "an argument out= or generator="
        if node.kwargs.get("pin_memory"):
            return "an argument pin_memory="
    if name == "view" and any(isinstance(value, torch.dtype) for value in values):
        return "a view as another dtype"  # it could make booleans of any byte
    for value in values:
        if _is_dtype_read(value) and name not in DTYPE_READERS:
            return f"the dtype of a tensor as an argument of {name}"
        if not isinstance(value, Node) and any(map(_is_dtype_read, _nodes_in(value))):
            return "the dtype of a tensor in a container"
    if isinstance(target, torch._ops.OpOverload):
        return _fault_of_schema(target, node.args, node.kwargs)
    fault = _fault_of_signature(target, node.args, node.kwargs)
    own_check = getattr(target, "fault_of", None)  # of a function of fxquant's that needs one
    return fault if fault is not None or own_check is None else own_check(node.args)


def written(target: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """For an op that leaves its memory unwritten, one that writes zeros, and its arguments."""
    name = target_name(target)
    other = _WRITTEN.get(name)
    if other is None:
        return target, kwargs
    if isinstance(target, str):
        return other, kwargs
    if name == "empty":
        kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
    if isinstance(target, torch._ops.OpOverload):
        return getattr(torch.ops.aten, other).default, kwargs
    return getattr(torch, other), kwargs


def _is_dtype_read(value: Any) -> bool:
    return isinstance(value, Node) and value.target is getattr and value.args[1:] == ("dtype",)


def _nodes_in(value: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(value, found.append)
    return found


def _fault_of_signature(target: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    signature = _signature(target)
    if signature is None:  # a builtin or a method's name: it checks by itself
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


@cache
def _signature(target: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


def _fault_of_schema(op: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """As the dispatcher checks it, but with torch's own types for dtypes and layouts.

    The dispatcher takes plain numbers for these, and among them are sparse layouts.
    """
    arguments = op._schema.arguments
    positional = [a for a in arguments if not a.kwarg_only]
    if len(args) > len(positional):
        return f"{len(args)} arguments of {op}"
    named = {a.name: v for a, v in zip(positional, args, strict=False)}
    unknown = set(kwargs) - ({a.name for a in arguments} - set(named))
    if unknown:
        return f"arguments {sorted(unknown)} of {op}"
    named |= kwargs
    for argument in arguments:
        if argument.name not in named:
            if not argument.has_default_value():
                return f"no argument {argument.name!r} of {op}"
        elif not _fits(str(argument.real_type), named[argument.name]):
            return f"an argument {argument.name!r} of {op} that is no {argument.real_type}"
    return None


_LITERAL: dict[str, Any] = {
    "ScalarType": torch.dtype,
    "Layout": torch.layout,
    "MemoryFormat": torch.memory_format,
    "Device": (torch.device, str),
}
_KINDS: dict[str, Any] = {
    "Tensor": (int, float, bool, complex),  # a number stands for a tensor of it
    "number": (int, float, bool, complex),
    "Scalar": (int, float, bool, complex),
    "int": int,
    "SymInt": int,
    "float": (int, float),
    "bool": (bool, int),
    "str": str,
}


def _fits(kind: str, value: Any) -> bool:
    if kind.startswith("Optional[") and kind.endswith("]"):
        return value is None or _fits(kind[len("Optional[") : -1], value)
    if kind in _LITERAL:
        return isinstance(value, _LITERAL[kind])
    if isinstance(value, Node):
        return True
    if kind.startswith("List[") and kind.endswith("]"):
        inner = kind[len("List[") : -1]
        parts = value if isinstance(value, list | tuple) else [value]  # one stands for all
        return all(_fits(inner, part) for part in parts)
    return kind in _KINDS and isinstance(value, _KINDS[kind])
