"""Traceable stand-ins for torch.nn's attention and transformer layers.

The originals branch on shapes and, in eval mode, take a fast path that reads `.weight` of their
children directly: a quantized child would be bypassed. The stand-ins share the originals' children
and parameters, keep their names, and always call them.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph.layers import has_hooks
from fxquant.graph.structures import graph_function
from fxquant.modules.float_linear import linear_around


@graph_function
def merge_attention_masks(
    query: Tensor,
    key: Tensor,
    heads: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor | None:
    """One additive mask, or None.

    Args:
        query: [..., target, width], after batch-first ordering.
        key: [..., source, width].
        heads: the number of heads.
        attn_mask: boolean (True hides) or additive, [target, source] or
            [batch · heads, target, source].
        key_padding_mask: boolean (True hides) or additive, [..., source].

    Returns:
        A mask that broadcasts against [..., heads, target, source].
    """
    merged = None
    if attn_mask is not None:
        merged = _additive(attn_mask, query.dtype)
        if merged.ndim == 3 and query.ndim == 3:
            merged = merged.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, query.dtype)[..., None, None, :]
        merged = padding if merged is None else merged + padding
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)


class TraceableMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` without control flow on values.

    Its projections are linear layers on the original's parameters: one for all three where query,
    key and value are the same tensor, else one each.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = original.embed_dim, original.num_heads
        self.head_dim, self.batch_first = original.head_dim, original.batch_first
        self.is_packed = original.in_proj_weight is not None
        bias = original.in_proj_bias
        biases: Any = (None, None, None) if bias is None else bias.detach().chunk(3)
        if self.is_packed:
            self.in_proj = linear_around(original.in_proj_weight, bias)
            weights: Any = original.in_proj_weight.detach().chunk(3)
        else:
            weights = (original.q_proj_weight, original.k_proj_weight, original.v_proj_weight)
        names = PROJECTIONS if self.is_packed else ("q_proj", "k_proj", "v_proj")
        self.projections = names
        for name, weight, vector in zip(names, weights, biases, strict=True):
            self.add_module(name, linear_around(weight, vector))
        self.out_proj = original.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention.forward` does; shapes and arguments are the same."""
        is_shared = query is key and key is value
        if not self.batch_first:
            is_memory = key is value
            query = query.transpose(0, 1)
            key = query if is_shared else key.transpose(0, 1)
            value = key if is_memory else value.transpose(0, 1)
        if self.is_packed and is_shared:  # one product for all three
            parts = self.in_proj(query).chunk(3, dim=-1)
            q, k, v = parts[0], parts[1], parts[2]  # a traced chunk can be indexed, not iterated
        else:
            q, k, v = (
                self.get_submodule(name)(x)
                for name, x in zip(self.projections, (query, key, value), strict=True)
            )
        mixed, weights = attend(
            q, k, v, query, key, self.num_heads, attn_mask, key_padding_mask,
            need_weights=need_weights, average=average_attn_weights,
        )  # fmt: skip
        output = self.out_proj(mixed)
        return (output if self.batch_first else output.transpose(0, 1)), weights


PROJECTIONS = ("in_proj_q", "in_proj_k", "in_proj_v")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query: Tensor,
    key: Tensor,
    heads: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    *,
    need_weights: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of projected queries, keys and values [..., tokens, width].

    Returns:
        The mixed values [..., tokens, width], and the attention weights if they are needed.
    """
    mask = None
    if attn_mask is not None or key_padding_mask is not None:
        mask = merge_attention_masks(query, key, heads, attn_mask, key_padding_mask)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (q, k, v))
    weights = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [..., heads, target, source]
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        mixed = weights @ v
        if average:
            weights = weights.mean(-3)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return mixed.transpose(-3, -2).flatten(-2), weights


def traceable_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` in ops that a graph shows one by one.

    Raises:
        NotImplementedError: it appends to keys and values, or trains: then it stays one op.
    """
    extras = (bias_k, bias_v, static_k, static_v)
    if any(extra is not None for extra in extras) or add_zero_attn or (training and dropout_p):
        raise NotImplementedError("attention with further keys and values, or with dropout")
    is_memory, is_shared = key is value, query is key and key is value
    query = query.transpose(0, 1)
    key = query if is_shared else key.transpose(0, 1)
    value = key if is_memory else value.transpose(0, 1)
    biases: Any = (None, None, None)
    if in_proj_bias is not None:
        third = in_proj_bias.chunk(3)
        biases = (third[0], third[1], third[2])
    if use_separate_proj_weight:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        thirds: Any = cast(Tensor, in_proj_weight).chunk(3)
        weights = (thirds[0], thirds[1], thirds[2])
    q, k, v = (
        F.linear(x, weight, bias)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    mixed, found = attend(
        q, k, v, query, key, num_heads, attn_mask, key_padding_mask,
        need_weights=need_weights, average=average_attn_weights,
    )  # fmt: skip
    return F.linear(mixed, out_proj_weight, out_proj_bias).transpose(0, 1), found


class TraceableTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` without its fast path."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As the original; `is_causal` is a hint that is not needed here."""
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal))
        return cast(Tensor, self.norm2(x + self._ff_block(x)))


class TraceableTransformerEncoder(nn.TransformerEncoder):
    """`nn.TransformerEncoder` without nested tensors and without detecting causal masks."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As the original."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else cast(Tensor, self.norm(src))


class TraceableTransformerDecoder(nn.TransformerDecoder):
    """`nn.TransformerDecoder` without detecting causal masks."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As the original."""
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
            )
        return tgt if self.norm is None else cast(Tensor, self.norm(tgt))


def _with_class(replacement: type[nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Change the class of a copied module; its state stays as it is."""

    def change(module: nn.Module) -> nn.Module:
        module.__class__ = replacement
        return module

    return change


def _replace_attention(module: nn.Module) -> nn.Module:
    attention = cast(nn.MultiheadAttention, module)
    if attention.bias_k is not None or attention.add_zero_attn:
        return attention  # stays opaque: it appends rows to keys and values
    return TraceableMultiheadAttention(attention)


# Functions of torch's that are entered when they are traced.
FUNCTION_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: traceable_attention_forward,
}

REPLACEMENTS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.MultiheadAttention: _replace_attention,
    nn.TransformerEncoderLayer: _with_class(TraceableTransformerEncoderLayer),
    nn.TransformerEncoder: _with_class(TraceableTransformerEncoder),
    nn.TransformerDecoder: _with_class(TraceableTransformerDecoder),
}


def replace_untraceable_layers(model: nn.Module) -> nn.Module:
    """Swap each layer of exactly a class in `REPLACEMENTS`, in place; shared ones stay shared."""
    replaced: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        replace = REPLACEMENTS.get(type(module))
        if replace is not None and not has_hooks(module) and "forward" not in vars(module):
            replaced[module] = replace(module)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in replaced:
                parent.register_module(name, replaced[child])
    return replaced.get(model, model)
