"""The table of patterns: to fuse something else, add a row and a test model.

A row changes a graph in place wherever its pattern is exact, and leaves it alone elsewhere. Nodes
whose value stays keep their names, so that `diff` shows what became of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule

from fxquant.fusion.attention import fuse_attention
from fxquant.fusion.convolutions import fuse_convolutions
from fxquant.fusion.functions import fuse_functions
from fxquant.fusion.gates import fuse_gates
from fxquant.fusion.norms import fuse_norms
from fxquant.fusion.pooling import fuse_pooling
from fxquant.fusion.shared_inputs import fuse_shared_inputs


@dataclass(frozen=True)
class Pattern:
    """Something that a graph computes in several nodes, and one kernel at once.

    Attributes:
        name: a word for it.
        before: what it looks like.
        after: what stands in its place.
        apply: fuses it everywhere in a graph.
    """

    name: str
    before: str
    after: str
    apply: Callable[[GraphModule], None]


PATTERNS: tuple[Pattern, ...] = (
    Pattern(
        "attention",
        before="scaled_dot_product_attention without dropout; keys and values repeated for heads",
        after="fxquant's attention, which reads them where they lie",
        apply=fuse_attention,
    ),
    Pattern(
        "gate",
        before="a function of one linear layer times another that reads the same value (SwiGLU)",
        after="a GatedLinear with the rows of both, which stores the products",
        apply=fuse_gates,
    ),
    Pattern(
        "shared input",
        before="linear layers of one format that read one value",
        after="a FusedLinear with the rows of all; their outputs are views of its output",
        apply=fuse_shared_inputs,
    ),
    Pattern(
        "function",
        before="a linear layer, then GELU (either form), ReLU, SiLU or tanh",
        after="a FusedLinear that applies the function to its output",
        apply=fuse_functions,
    ),
    Pattern(
        "convolution",
        before="a convolution of integers; an addition and a function; rounding to integers",
        after="a QuantizedConv that is told what to compute around it, on integers throughout",
        apply=fuse_convolutions,
    ),
    Pattern(
        "pooling",
        before="max pooling in two dimensions behind such a convolution",
        after="fxquant's, which is made for channels that lie last in memory",
        apply=fuse_pooling,
    ),
    Pattern(
        "norm",
        before="an addition, then LayerNorm; RMSNorm in any form, with or without an addition",
        after="fxquant's norm, or add_and_norm where the sum is read again",
        apply=fuse_norms,
    ),
)
