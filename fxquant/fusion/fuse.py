"""Fuse: carry out what a quantized graph computes in fewer and larger steps.

before: `q = self.q(x)`, `k = self.k(x)`, `v = self.v(x)`, `y = scaled_dot_product_attention(…)`
after:  `q, k, v = self.q_k_v(x)`, `y = attention(…)`
"""

from torch.fx import GraphModule

from fxquant.fusion.patterns import PATTERNS
from fxquant.graph.copying import copy_owning_tensors, copy_sharing_tensors
from fxquant.graph.effects import remove_unused
from fxquant.graph.graph_module import check_graph
from fxquant.graph.layers import finish


def fuse(graph_module: GraphModule, *, share_memory: bool = False) -> GraphModule:
    """A graph that computes the same in fewer and larger steps, which are faster on CPUs.

    Fused are the patterns of `fxquant/fusion/patterns.py`, each only where it is exact: attention
    without dropout, quantized linear layers of one format that read one value, functions behind a
    linear layer, and norms with the addition before them. `diff` shows what became of each node.
    With float activations outputs agree within the rounding of the dtype (beyond 100 dB in
    float32); with int8 ones a last bit may round to the neighbouring integer. `swap_modules` takes
    the graph before `fuse`, whose bits it keeps.

    Args:
        graph_module: from `quantize`, `load_model` or `trace`; it is not changed.
        share_memory: let what is not fused lie in the memory of `graph_module`.

    Returns:
        A new graph. It can be fused, copied, moved and saved like any other.

    Raises:
        OptionError: `graph_module` is no graph.
    """
    check_graph("fuse", graph_module)
    copied = copy_sharing_tensors if share_memory else copy_owning_tensors
    fused: GraphModule = copied(graph_module)
    for pattern in PATTERNS:
        pattern.apply(fused)
        remove_unused(fused)
    fused.delete_all_unused_submodules()
    finish(fused)
    return fused
