"""fxquant's attention under the name `"fxquant"` among those of transformers.

`model.set_attn_implementation("fxquant")` makes a model of transformers call it, whether its layers
are quantized or not. Masks are those of `"sdpa"`. Where a call asks for more than `attention`
computes (dropout, a bias of positions, a cache of pages), transformers' own `"sdpa"` computes it:
the call's arguments decide, nothing else.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fxquant.kernels.attention import attention

NAME = "fxquant"
_MORE = ("position_bias", "cache", "softcap")  # arguments that change what is computed


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in the place of `"sdpa"`, with the same arguments.

    Args:
        module: the attention layer.
        query: [batch, heads, queries, width].
        key: [batch, key heads, keys, width]; heads of queries share them.
        value: [batch, key heads, keys, value width].
        attention_mask: None, or broadcasts to [batch, heads, queries, keys]; boolean (True takes
            part) or added.
        dropout: of probabilities.
        scaling: of the products; None: 1 / √width.
        is_causal: whether, without a mask, query i sees the keys 0 to i; None: as the layer says.
        **options: what else `"sdpa"` takes.

    Returns:
        [batch, queries, heads, value width], and None in the place of the probabilities.
    """
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if dropout or is_traced or any(options.get(name) is not None for name in _MORE):
        given: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return given
    queries = query.shape[2]
    wanted = getattr(module, "is_causal", True) if is_causal is None else is_causal
    sees_before = queries > 1 and attention_mask is None and bool(wanted)
    if sees_before and key.shape[2] > queries:  # an empty cache with room for more tokens
        key, value = key[:, :, :queries], value[:, :, :queries]
    y = attention(query, key, value, attention_mask, sees_before, scaling)
    return y.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Make the name known to transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
