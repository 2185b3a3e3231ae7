"""`torch.vmap` in an exported program: the ops on rows become the ops on batches that run.

An exported program enters and leaves `vmap` by nodes of its own, between which tensors are rows; a
graph that is run node by node, observed and saved has no such state. Torch itself knows how to
write the region without it.

before: `row = _add_batch_dim(x, 0, 1); y = aten.linear(row, w, b); out = _remove_batch_dim(y, ...)`
after: `y = aten.matmul(x, t(w)); out = aten.add(y, b)`
"""

from torch.export import ExportedProgram
from torch.fx import Node

_STATE = "torch._functorch.predispatch"  # where the functions live that enter and leave


def without_vmap(program: ExportedProgram) -> ExportedProgram:
    """The program with plain ops alone; one that has no `vmap` is returned as it is."""
    if not any(map(_changes_state, program.graph.nodes)):
        return program
    plain = program.run_decompositions({})  # of no op; what is under `vmap` is written out
    plain._guards_code = program._guards_code
    return plain


def _changes_state(node: Node) -> bool:
    return getattr(node.target, "__module__", None) == _STATE
