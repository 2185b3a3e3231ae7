"""What of a graph was fused, and the refusal of those who need the plain one."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Node

from fxquant.errors import OptionError
from fxquant.fusion.convolutions import is_fused_convolution
from fxquant.kernels.attention import attention
from fxquant.kernels.norm import add_and_norm, norm
from fxquant.kernels.pooling import max_pool
from fxquant.modules.fused_linear import FusedLinear
from fxquant.modules.gated_linear import GatedLinear

# By the name of the row in `patterns.py` that made them.
_FUNCTIONS: dict[Callable[..., Any], str] = {
    attention: "attention",
    norm: "norm",
    add_and_norm: "norm",
    max_pool: "pooling",
}


def fused_nodes(gm: GraphModule) -> list[str]:
    """The names of nodes that stand for several operations."""
    return [node.name for node in gm.graph.nodes if _pattern(gm, node) is not None]


def fused_counts(gm: GraphModule) -> dict[str, int]:
    """How many nodes stand for several operations, by the name of the pattern."""
    names = [_pattern(gm, node) for node in gm.graph.nodes]
    return dict(Counter(name for name in names if name is not None))


def refuse_fused(where: str, gm: GraphModule) -> None:
    """Raise an `OptionError` if a part of `gm` is fused."""
    names = fused_nodes(gm)
    if names:
        raise OptionError(
            where,
            found=f"a fused graph ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})",
            needed="the graph as it was quantized",
            remedy="Pass the graph that fuse was given: its layers are those of the model. "
            "quantize returns it with fuse=False.",
        )


def _pattern(gm: GraphModule, node: Node) -> str | None:
    """The name of the pattern that a node stands for, or None."""
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target) if callable(node.target) else None
    if is_fused_convolution(gm, node):
        return "convolution"
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, GatedLinear):
        return "gate"
    if not isinstance(module, FusedLinear):
        return None
    return "function" if len(module.sizes) == 1 else "shared input"
