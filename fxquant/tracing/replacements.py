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

from fxquant.graph.structures import graph_function


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
    """`nn.MultiheadAttention` without control flow on values."""

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = original.embed_dim, original.num_heads
        self.head_dim, self.batch_first = original.head_dim, original.batch_first
        self.is_packed = original.in_proj_weight is not None
        if self.is_packed:
            self.in_proj_weight = original.in_proj_weight
        else:
            self.q_proj_weight = original.q_proj_weight
            self.k_proj_weight = original.k_proj_weight
            self.v_proj_weight = original.v_proj_weight
        self.in_proj_bias = original.in_proj_bias
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
        q, k, v = self._project(query, key, value, is_shared)  # [..., tokens, width]
        mask = None
        if attn_mask is not None or key_padding_mask is not None:
            mask = merge_attention_masks(query, key, self.num_heads, attn_mask, key_padding_mask)
        q, k, v = self._split(q), self._split(k), self._split(v)  # [..., heads, tokens, head]
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            mixed = weights @ v
            if average_attn_weights:
                weights = weights.mean(-3)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        output = self.out_proj(mixed.transpose(-3, -2).flatten(-2))
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, is_shared: bool
    ) -> tuple[Tensor, ...]:
        bias = self.in_proj_bias
        if self.is_packed and is_shared:  # one product for all three
            return F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if self.is_packed:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        inputs = (query, key, value)
        # A traced chunk can be indexed, not iterated.
        return tuple(F.linear(inputs[i], weights[i], biases[i]) for i in range(3))


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
        if replace is not None:
            replaced[module] = replace(module)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in replaced:
                parent.register_module(name, replaced[child])
    return replaced.get(model, model)
