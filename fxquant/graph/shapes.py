"""What is known of a graph's nodes beside the graph: shapes, dtypes, the module an op ran in."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

SHAPE = "fxquant_shape"  # node.meta: list of sizes
DTYPE = "fxquant_dtype"  # node.meta: name of the dtype
MODULE_PATH = "fxquant_module_path"  # node.meta: the innermost module the op ran in
KEPT = (SHAPE, DTYPE, MODULE_PATH)  # what a saved graph keeps


def record_shapes(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run `gm` and note on each node the shape and dtype of its tensor."""
    placeholders = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    given = dict(zip(placeholders, args, strict=False)) | kwargs
    defaults = {
        str(n.target): n.args[0] for n in gm.graph.nodes if n.op == "placeholder" and n.args
    }
    with torch.no_grad():
        _Recorder(gm).run(*[given.get(name, defaults.get(name)) for name in placeholders])


class _Recorder(Interpreter):
    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta[SHAPE] = list(result.shape)
            n.meta[DTYPE] = str(result.dtype).removeprefix("torch.")
        return result
