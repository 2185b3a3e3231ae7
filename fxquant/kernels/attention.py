"""Scaled dot product attention in C++ (csrc/attention_rows.h), and torch's where it cannot serve.

Storage is float32, bfloat16 or float16; scores, exponentials and sums are float32. Queries, keys
and values are read where they lie, whatever their strides. Heads of queries may share heads of keys
(grouped queries). What a row gives depends neither on
the batch nor on the threads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.errors import OptionError
from fxquant.kernels.eager import is_plain
from fxquant.kernels.extension import FLOAT_TYPES, NOT_BUILT, _native
from fxquant.kernels.registration import LIBRARY, implements

DIMENSIONS = 4  # [batch, heads, tokens, width]
NO_MASK, BOOLEAN_MASK, FLOAT_MASK = 0, 1, 2  # csrc/attention.h: a float type's number is added

ATTENTION_SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float? scale)"
    " -> Tensor"
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(query · keyᵀ · scale + mask) · value.

    Args:
        query: [batch, heads, queries, width].
        key: [batch, key heads, keys, width]; the heads of queries are a multiple of those of keys.
        value: [batch, key heads, keys, value width].
        mask: broadcasts to [batch, heads, queries, keys]; boolean (True takes part) or added.
        is_causal: query i sees the keys 0 to i; then there is no mask.
        scale: of the products; None: 1 / √width.

    Returns:
        [batch, heads, queries, value width]; in memory heads come after queries. A row that sees no
        key is 0.
    """
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if not all(map(is_plain, tensors)) or (
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    ):
        return ATTENTION(query, key, value, mask, is_causal, scale)
    return _attend(query, key, value, mask, is_causal, scale)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """The op for plain tensors on a CPU."""
    made = _attend_natively(query, key, value, mask, is_causal, scale)
    if made is None:
        made = _attend_in_torch(query, key, value, mask, is_causal, scale)
    return made


def _attend_natively(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor | None:
    """The kernel's result; None where it does not serve, or the shapes do not fit."""
    dtype = query.dtype
    if (
        FAULT is not None
        or dtype not in FLOAT_TYPES
        or key.dtype != dtype
        or value.dtype != dtype
        or query.ndim != DIMENSIONS
        or (mask is not None and is_causal)  # which torch refuses
    ):
        return None
    mask_address, mask_type = 0, NO_MASK
    mask_shape: tuple[int, ...] = ()
    mask_strides: tuple[int, ...] = ()
    if mask is not None:
        if mask.dtype == torch.bool:
            mask_type = BOOLEAN_MASK
        elif mask.dtype == dtype:
            mask_type = FLOAT_MASK + FLOAT_TYPES[dtype]
        else:
            return None
        mask_address, mask_shape, mask_strides = mask.data_ptr(), mask.shape, mask.stride()
    batch, heads, queries, width = query.shape
    y = query.new_empty(batch, queries, heads, value.shape[-1])
    done = _native.attention(
        query.data_ptr(),
        query.shape,
        query.stride(),
        key.data_ptr(),
        key.shape,
        key.stride(),
        value.data_ptr(),
        value.shape,
        value.stride(),
        y.data_ptr(),
        FLOAT_TYPES[dtype],
        mask_address,
        mask_type,
        mask_shape,
        mask_strides,
        is_causal,
        width**-0.5 if scale is None else scale,
        torch.get_num_threads(),
    )
    return y.transpose(1, 2) if done else None


def _attend_in_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Torch's op, with the kernel's order of memory.

    Raises:
        OptionError: there are more or fewer values than keys, which torch does not check.
    """
    if key.shape[-2:-1] != value.shape[-2:-1]:
        raise OptionError(
            "attention",
            found=f"keys {list(key.shape)} and values {list(value.shape)}",
            needed="a value for each key",
            remedy="Pass keys and values of the same tokens.",
        )
    is_grouped = query.ndim == DIMENSIONS and query.shape[1] != key.shape[1]
    y = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
    )
    return y if y.ndim != DIMENSIONS else y.transpose(1, 2).contiguous().transpose(1, 2)


@implements(ATTENTION_SCHEMA, "CompositeExplicitAutograd")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """The op for any caller, as an exported program that runs where nothing was built."""
    on_cpu = all(t.is_cpu for t in (query, key, value, mask) if t is not None)
    call = _attend if on_cpu else _attend_in_torch
    return call(query, key, value, mask, is_causal, scale)


def _attention_shape(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    shape = (*query.shape[:-1], value.shape[-1])
    if query.ndim != DIMENSIONS:
        return query.new_empty(shape)
    batch, heads, queries, width = shape
    return query.new_empty(batch, queries, heads, width).transpose(1, 2)


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Torch's own, of its op on the same inputs."""
    needed = ctx.needs_input_grad[: len(ctx.saved_tensors)]
    inputs: list[Any] = [t if t is None else t.detach() for t in ctx.saved_tensors]
    query, key, value, mask = inputs
    wanted = [t.requires_grad_() for t, needs in zip(inputs, needed, strict=True) if needs]
    with torch.enable_grad():
        y = _attend_in_torch(query, key, value, mask, ctx.is_causal, ctx.scale)
    found = iter(torch.autograd.grad(y, wanted, gradient))
    return (*(next(found) if needs else None for needs in needed), None, None)


torch.library.register_fake("fxquant::attention", _attention_shape, lib=LIBRARY)
torch.library.register_autograd(
    "fxquant::attention", _gradients, setup_context=_keep_for_gradient, lib=LIBRARY
)
ATTENTION = torch.ops.fxquant.attention.default


def self_test() -> str | None:
    """Attend in a small known case: why the extension cannot be trusted here, or None."""
    if NOT_BUILT is not None:
        return NOT_BUILT
    wave = torch.arange(2 * 4 * 30 * 20, dtype=torch.float32, device="cpu").sin()
    query, key = wave.view(2, 4, 30, 20), wave[: 2 * 2 * 30 * 20].view(2, 2, 30, 20).cos()
    for mask in (None, wave[: 30 * 30].view(30, 30), wave[: 30 * 30].view(30, 30) > 0):
        for count in (30, 2):
            options = (None if mask is None else mask[:count], mask is None, 0.3)
            found = _attend_natively(query[:, :, :count], key, key, *options)
            expected = _attend_in_torch(query[:, :, :count], key, key, *options)
            if found is None or not torch.allclose(found, expected, rtol=0, atol=1e-5):
                return f"it computes wrong results on this CPU ({_native.instruction_sets()[0]})"
    return None


FAULT: str | None = None
FAULT = self_test()  # once: later calls may run under a fake or meta device
