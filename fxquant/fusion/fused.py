"""What of a graph was fused, and the refusal of those who need the plain one."""

from torch.fx import GraphModule

from fxquant.errors import OptionError
from fxquant.kernels.attention import attention
from fxquant.kernels.norm import add_and_norm, norm
from fxquant.modules.fused_linear import FusedLinear

FUSED_FUNCTIONS = (attention, norm, add_and_norm)
MODULES = (FusedLinear,)


def fused_nodes(gm: GraphModule) -> list[str]:
    """The names of nodes that stand for several operations."""
    return [
        node.name
        for node in gm.graph.nodes
        if node.target in FUSED_FUNCTIONS
        or (node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), MODULES))
    ]


def refuse_fused(where: str, gm: GraphModule) -> None:
    """Raise an `OptionError` if a part of `gm` is fused."""
    names = fused_nodes(gm)
    if names:
        raise OptionError(
            where,
            found=f"a fused graph ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})",
            needed="the graph as it was quantized",
            remedy="Pass the graph that fuse was given: its layers are those of the model.",
        )
