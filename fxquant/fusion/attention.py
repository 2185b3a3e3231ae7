"""Scaled dot product attention becomes fxquant's own, where both are the same function.

before: `y = scaled_dot_product_attention(q, repeated(k), repeated(v), mask, scale=...)`
after:  `y = attention(q, k, v, mask, is_causal, scale)`

Dropout must be 0 as written in the graph. Where keys and values are repeated so that each head has
its own (`unsqueeze`, `expand`, `reshape`), that is left out: `attention` lets heads share.
"""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.fusion.strides import VIEWS, free_strides, let_strides_change
from fxquant.graph.ops import op_name
from fxquant.kernels.attention import attention

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None,
             "enable_gqa": False}  # fmt: skip
HEADS_AXIS = 1  # the dimension that counts heads
LARGEST_INDEX = (1 << 63) - 1  # where a slice ends that takes everything


def fuse_attention(gm: GraphModule) -> None:
    """Fuse it wherever nothing but a literal decides which function it is."""
    for node in list(gm.graph.nodes):
        if op_name(node) != "scaled_dot_product_attention":
            continue
        given = _arguments(node)
        views = None if given is None else free_strides(node, gm)
        if given is None or views is None:
            continue
        let_strides_change(views)
        key, value = _not_repeated(given["key"]), _not_repeated(given["value"])
        if key is None or value is None:
            key, value = given["key"], given["value"]
        node.op, node.target = "call_function", attention
        node.args = (given["query"], key, value, given["attn_mask"])
        node.kwargs = {"is_causal": given["is_causal"], "scale": given["scale"]}


def _arguments(node: Node) -> dict[str, Any] | None:
    """The arguments by name; None unless they are values and literals of `attention`."""
    given = {**_DEFAULTS, **dict(zip(ARGUMENTS, node.args, strict=False)), **node.kwargs}
    tensors = [given.get(name) for name in ("query", "key", "value")]
    is_exact = (
        all(isinstance(t, Node) for t in tensors)
        and given["dropout_p"] == 0
        and not isinstance(given["dropout_p"], Node)
        and isinstance(given["is_causal"], bool)
        and isinstance(given["enable_gqa"], bool)
        and (given["scale"] is None or isinstance(given["scale"], int | float))
        and (given["attn_mask"] is None or isinstance(given["attn_mask"], Node))
        and set(given) == set(ARGUMENTS)
    )
    return given if is_exact else None


def _not_repeated(node: Node) -> Node | None:
    """[batch, key heads, keys, width] of which `node` repeats each head in turn, or None.

    It reads `x.unsqueeze(2).expand(b, key heads, n, keys, width).reshape(b, key heads · n, …)`, and
    `x[:, :, None]` as exported programs have it; the sizes are written alike in both steps.
    """
    if op_name(node) not in ("reshape", *VIEWS):
        return None
    sizes = _sizes(node)
    expanded = _first(_through(node, "contiguous", "clone"))
    if expanded is None or op_name(expanded) != "expand":
        return None
    to = _sizes(expanded)
    if (
        len(to) != 5
        or len(sizes) != 4
        or not _multiplies(sizes[HEADS_AXIS], to[HEADS_AXIS], to[HEADS_AXIS + 1])
    ):
        return None
    if [sizes[0], *sizes[2:]] != [to[0], *to[3:]]:
        return None
    inserted = _first(_through(expanded, "whole slice"))
    if inserted is None or not _inserts_dimension(inserted):
        return None
    return _first(_through(inserted, "whole slice"))


def _sizes(node: Node) -> list[Any]:
    """The sizes that a reshape or an expand was given, as one list or one by one."""
    given = node.args[1:]
    if len(given) == 1 and isinstance(given[0], list | tuple):
        return list(given[0])
    return list(given)


def _multiplies(product: Any, heads: Any, times: Any) -> bool:
    numbers = all(isinstance(n, int) and n > 0 for n in (product, heads, times))
    return numbers and product == heads * times


def _first(node: Node) -> Node | None:
    source = node.args[0] if node.args else None
    return source if isinstance(source, Node) else None


def _through(node: Node, *names: str) -> Node:
    """The last node, going back from `node`, whose source is none of the steps named."""
    while (source := _first(node)) is not None and (
        op_name(source) in names or ("whole slice" in names and _is_whole_slice(source))
    ):
        node = source
    return node


def _inserts_dimension(node: Node) -> bool:
    """Whether it makes [batch, heads, 1, keys, width] of [batch, heads, keys, width]."""
    if node.target is operator.getitem:
        wanted: Any = node.args[1]
        whole = slice(None)
        is_sliced = isinstance(wanted, tuple) and wanted[:3] == (whole, whole, None)
        return is_sliced and all(part == whole for part in wanted[3:])
    return op_name(node) == "unsqueeze" and node.args[1:] in ((2,), (-3,))


def _is_whole_slice(node: Node) -> bool:
    if node.target is operator.getitem:
        wanted = node.args[1]
        return isinstance(wanted, tuple) and all(part == slice(None) for part in wanted)
    is_slice = node.target is torch.ops.aten.slice.Tensor and not node.kwargs
    return is_slice and tuple(node.args[2:]) in ((0,), (0, LARGEST_INDEX))
