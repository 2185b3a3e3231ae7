"""Whether a value of a graph may lie in memory in another way than it does.

The values of a fused node are those of the nodes it stands for, but where they lie is not: outputs
of several layers may be parts of one tensor. Almost no op depends on that. `view` does, and
becomes `reshape`; whatever else could tell the difference keeps the nodes from being fused.
"""

import operator

from torch.fx import GraphModule, Node

from fxquant.graph.effects import is_foreign, writes
from fxquant.graph.loops import loop
from fxquant.graph.ops import is_own, op_name, op_of

VIEWS = frozenset(("view", "_unsafe_view"))
# Ops that read strides, or give a tensor in other memory than their rules tell.
_READS_STRIDES = frozenset(
    ("as_strided", "strided_view", "view_as", "view_as_complex", "view_as_real", "real", "imag",
     "stride", "sym_stride", "is_contiguous", "storage_offset", "unfold", "data_ptr",
     "untyped_storage")
)  # fmt: skip
_INQUIRIES = ("shape", "dtype", "device", "ndim")  # attributes that say nothing of strides
_SPACES = ("torch", "_operator", "math", "builtins", "fxquant")


def free_strides(value: Node, gm: GraphModule) -> list[Node] | None:
    """The views that must become `reshape` if `value` lies elsewhere; None if it must stay."""
    found: list[Node] = []
    seen: set[Node] = set()
    waiting = [value]
    while waiting:
        for user in waiting.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if not _ignores_strides(user, gm):
                return None
            if op_name(user) in VIEWS:
                found.append(user)
            if op_of(user).view or user.target is operator.getitem:
                waiting.append(user)
    return found


def let_strides_change(views: list[Node]) -> None:
    """Make `reshape` of views: the same values, copied where they lie apart."""
    for node in views:
        node.op, node.target = "call_method", "reshape"


def _ignores_strides(node: Node, gm: GraphModule) -> bool:
    """Whether a node computes the same of a tensor wherever it lies, and does not write into it."""
    if node.op == "output" or writes(node, gm) or op_name(node) in _READS_STRIDES:
        return False
    if node.target is getattr:
        return node.args[1] in _INQUIRIES
    if node.op == "call_module":
        return not any(map(is_foreign, gm.get_submodule(str(node.target)).modules()))
    if node.op == "call_function":
        space = str(getattr(node.target, "__module__", None) or "torch").split(".")[0]
        return node.target is not loop and (is_own(node.target) or space in _SPACES)
    return True
