"""How error flows through a graph: what arrives at each node, and what the node makes of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from fxquant.config.skip_rules import type_name
from fxquant.graph.layers import user_name
from fxquant.numerics.metrics import SqnrMeter


@dataclass(frozen=True)
class NodeFlow:
    """The error at one node of the outermost graph.

    Attributes:
        node: its name.
        kind: the op.
        sqnr_db: of its value, float against quantized.
        input_sqnr_db: the least SQNR among its inputs; None where no input carries error.
        gain_db: how much worse the output is than that input, in dB: above 0 the node amplifies
            error (or adds its own), below 0 it damps it. None without erroneous input.
        shares: at a join, the share of noise power that each erroneous input brought, 0..1.
    """

    node: str
    kind: str
    sqnr_db: float
    input_sqnr_db: float | None
    gain_db: float | None
    shares: dict[str, float] = field(default_factory=dict)


def error_flow(nodes: Mapping[Node, SqnrMeter]) -> list[NodeFlow]:
    """How error flows through a graph, from the meters of a paired run, in their order."""
    return [_flow(node, nodes) for node in nodes]


def _flow(node: Node, meters: Mapping[Node, SqnrMeter]) -> NodeFlow:
    meter = meters[node]
    erroneous = [n for n in node.all_input_nodes if n in meters and meters[n].noise > 0]
    least = min((meters[n].db for n in erroneous), default=None)
    total = sum(meters[n].noise for n in erroneous)
    is_join = len(erroneous) > 1
    return NodeFlow(
        node=node.name,
        kind=_kind(node),
        sqnr_db=meter.db,
        input_sqnr_db=least,
        gain_db=None if least is None or meter.noise == 0 else least - meter.db,
        shares={n.name: meters[n].noise / total for n in erroneous} if is_join else {},
    )


def _kind(node: Node) -> str:
    if node.op == "call_module":
        owner = node.graph.owning_module
        return str(node.target) if owner is None else user_name(owner, str(node.target))
    return type_name(node.target)
