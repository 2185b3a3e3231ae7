"""What is known of a graph's nodes beside the graph: shapes, dtypes, the module an op ran in."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.graph.calls import Call
from fxquant.graph.interpreter import GraphInterpreter
from fxquant.graph.left_alone import left_alone, process_left_alone

SHAPE = "fxquant_shape"  # node.meta: list of sizes
DTYPE = "fxquant_dtype"  # node.meta: name of the dtype
MODULE_PATH = "fxquant_module_path"  # node.meta: the innermost module the op ran in
KEPT = (SHAPE, DTYPE, MODULE_PATH)  # what a saved graph keeps


def record_shapes(gm: GraphModule, call: Call) -> None:
    """Run `gm` and note on each node the shape and dtype of its tensor; it is left as it was."""
    with process_left_alone(), left_alone(gm), torch.no_grad():
        _Recorder(gm).run(*input_values(gm, call.clone()))


def input_values(gm: GraphModule, call: Call) -> list[Any]:
    """The value of each placeholder for one call, defaults included."""
    named = {str(n.target): (*n.args, inspect.Parameter.empty)[0]
             for n in gm.graph.nodes if n.op == "placeholder"}  # fmt: skip
    if "*args" in named or "**kwargs" in named:
        return [call.args if name == "*args" else call.kwargs for name in named]
    values = call.bind(named)
    return [values.get(name) for name in named]


class _Recorder(GraphInterpreter):
    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta[SHAPE] = list(result.shape)
            n.meta[DTYPE] = str(result.dtype).removeprefix("torch.")
        return result
