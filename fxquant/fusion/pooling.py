"""Max pooling behind a fused convolution is fxquant's own, made for channels that lie last.

before: `y = self.conv(q, grid=(s, z), …)`, `p = self.pool(y)`
after:  `p = max_pool(y, …)`
"""

from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.fusion.convolutions import is_fused_convolution
from fxquant.graph.layers import has_hooks
from fxquant.kernels.pooling import max_pool

_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def fuse_pooling(gm: GraphModule) -> None:
    """Put fxquant's pooling in place of torch's wherever a fused convolution is before it."""
    for node in gm.graph.nodes:
        source = node.args[0] if node.args else None
        if not isinstance(source, Node) or not is_fused_convolution(gm, source):
            continue
        given = _options(gm, node)
        if given is None or given["ceil_mode"] or given["return_indices"]:
            continue
        sizes = [_pair(given[name]) for name in _OPTIONS[:4]]
        if any(size is None for size in sizes):
            continue
        node.op, node.target = "call_function", max_pool
        kernel, stride, padding, dilation = sizes
        node.args, node.kwargs = (source, kernel, stride, padding, dilation), {}


def _options(gm: GraphModule, node: Node) -> dict[str, Any] | None:
    """The options of a max pooling in two dimensions, by name, or None."""
    if node.op == "call_module":
        module: Any = gm.get_submodule(str(node.target))
        is_plain = type(module) is nn.MaxPool2d and not has_hooks(module)
        is_plain = is_plain and len(node.args) == 1 and not node.kwargs
        return {name: getattr(module, name) for name in _OPTIONS} if is_plain else None
    if node.target is not F.max_pool2d:
        return None
    given: dict[str, Any] = dict(zip(_OPTIONS, (None, None, 0, 1, False, False), strict=True))
    given |= dict(zip(_OPTIONS, node.args[1:], strict=False)) | node.kwargs
    return {**given, "stride": given["stride"] or given["kernel_size"]}


def _pair(size: Any) -> tuple[int, int] | None:
    sizes = (size, size) if isinstance(size, int) else tuple(size or ())
    fits = len(sizes) == 2 and all(type(number) is int for number in sizes)
    return (sizes[0], sizes[1]) if fits else None
