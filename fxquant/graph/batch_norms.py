"""BatchNorm with running statistics, as a graph calls it: a module, or a function of constants.

Along dimension 1, y = (x - running_mean) / sqrt(running_var + eps) · weight + bias: each channel
times a number, plus another.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from fxquant.graph.effects import argument
from fxquant.graph.layers import has_hooks, tensor_attribute, user_name
from fxquant.graph.ops import op_of
from fxquant.graph.shapes import SHAPE

STATISTICS = ("running_mean", "running_var")
ROLES = (*STATISTICS, "weight", "bias")
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)  # which is the same in evaluation mode
_RANKS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}  # of inputs; other classes take several


@dataclass(frozen=True)
class BatchNormCall:
    """A node that normalizes with running statistics.

    Attributes:
        node: the node.
        source: what it reads.
        name: the user's name of the norm; of a function, of what owns its statistics.
        tensors: by role (`ROLES`), each [channels]; an affine one that lacks is absent.
        names: the user's names of these tensors.
        eps: what is added to the variance.
        rank: how many dimensions the input has, where that is known.
        counter_bytes: of the counter of batches that a module holds.
    """

    node: Node
    source: Node
    name: str
    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]
    eps: float
    rank: int | None
    counter_bytes: int = 0

    def factor_and_offset(self) -> tuple[Tensor, Tensor]:
        """What the norm multiplies by and adds, float64 [channels]."""
        values = {role: tensor.detach().double() for role, tensor in self.tensors.items()}
        factor = (values["running_var"] + self.eps).rsqrt()
        if "weight" in values:
            factor = factor * values["weight"]
        offset = -values["running_mean"] * factor
        return factor, offset + values["bias"] if "bias" in values else offset

    def is_same(self, other: "BatchNormCall") -> bool:
        """Whether both calls normalize by the same tensors."""
        return self.eps == other.eps and self.names == other.names


def neutral_value(role: str, eps: float) -> float:
    """What a norm's tensor holds so that the norm multiplies by exactly 1 and adds exactly 0.

    Where eps is below 1, the difference 1 - eps is off by at most half a unit of its last place.
    Its inverse root is then off by a quarter, which changes no value of that dtype.
    """
    return {"running_mean": 0.0, "running_var": 1.0 - eps, "weight": 1.0, "bias": 0.0}[role]


def batch_norm_call(gm: GraphModule, node: Node) -> BatchNormCall | None:
    """The norm that a node calls; None where it calls none, or one without running statistics."""
    if node.op == "call_module":
        return _of_module(gm, node)
    return _of_function(gm, node) if op_of(node).affine else None


def _of_module(gm: GraphModule, node: Node) -> BatchNormCall | None:
    norm = gm.get_submodule(str(node.target))
    if not isinstance(norm, _BatchNorm) or type(norm).forward not in _FORWARDS:
        return None
    source = node.args[0] if node.args else node.kwargs.get("input")
    tensors = {role: t for role in ROLES if isinstance(t := getattr(norm, role, None), Tensor)}
    if (
        not isinstance(source, Node)
        or not tensors.keys() >= set(STATISTICS)
        or norm.training
        or has_hooks(norm)
        or "forward" in vars(norm)
    ):
        return None
    name = user_name(gm, str(node.target))
    names = {role: f"{name}.{role}" for role in tensors}
    counter = 0 if norm.num_batches_tracked is None else norm.num_batches_tracked.nbytes
    return BatchNormCall(node, source, name, tensors, names, norm.eps, _rank(source, norm), counter)


def _of_function(gm: GraphModule, node: Node) -> BatchNormCall | None:
    source, eps = argument(node, "input", None), argument(node, "eps", 1e-5)
    given = {role: argument(node, role, None) for role in ROLES}
    constants = {role: value for role, value in given.items() if value is not None}
    if (
        not isinstance(source, Node)
        or not constants.keys() >= set(STATISTICS)
        or argument(node, "training", False) is not False
        or not isinstance(eps, float)
        or not all(isinstance(c, Node) and c.op == "get_attr" for c in constants.values())
    ):
        return None
    tensors = {role: tensor_attribute(gm, constant) for role, constant in constants.items()}
    names = {role: user_name(gm, str(constant.target)) for role, constant in constants.items()}
    name = names["running_mean"].rpartition(".")[0] or node.name
    return BatchNormCall(node, source, name, tensors, names, eps, _rank(source))


def _rank(source: Node, norm: nn.Module | None = None) -> int | None:
    """The dimensions of a norm's input: of some classes always the same, else as recorded."""
    shape = source.meta.get(SHAPE)
    return _RANKS.get(type(norm)) if shape is None else len(shape)  # type: ignore[arg-type]
