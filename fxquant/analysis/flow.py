"""How error flows through a graph: what arrives at each node, and what the node makes of it.

The float and the quantized graph run side by side, node by node, on the same batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from fxquant.analysis.stepper import Call, Stepper, is_tensor
from fxquant.graph.scopes import user_name
from fxquant.numerics.metrics import SqnrMeter
from fxquant.passes.rules import type_name


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


def measure_flow(
    float_gm: GraphModule, quantized_gm: GraphModule, calls: Iterable[Call]
) -> list[NodeFlow]:
    """Follow the error of a quantized graph.

    Args:
        float_gm: the traced model.
        quantized_gm: the same graph with quantized layers.
        calls: batches as `(args, kwargs)`.

    Returns:
        One entry for each node with a floating tensor, in order. It costs one float and one
        quantized pass.
    """
    meters: dict[Node, SqnrMeter] = {}
    for call in calls:
        _run_side_by_side(Stepper(float_gm, call), Stepper(quantized_gm, call), meters)
    return [_flow(node, meters) for node in meters]


def _run_side_by_side(clean: Stepper, noisy: Stepper, meters: dict[Node, SqnrMeter]) -> None:
    partner = {node.name: node for node in clean.nodes}
    position = {node: i for i, node in enumerate(clean.nodes)}
    clean_values: dict[Node, Any] = {}
    noisy_values: dict[Node, Any] = {}
    done = 0
    for index, node in enumerate(noisy.nodes):
        noisy_values[node] = noisy.compute(node, noisy_values)
        other = partner.get(node.name)
        if other is not None:
            while done <= position[other]:  # nodes that the rewriting removed run too
                clean_values[clean.nodes[done]] = clean.compute(clean.nodes[done], clean_values)
                done += 1
            a, b = clean_values[other], noisy_values[node]
            if node.op != "output" and is_tensor(a) and is_tensor(b) and a.shape == b.shape:
                meters.setdefault(node, SqnrMeter()).add(a, b)
            clean.free(clean_values, done)
        noisy.free(noisy_values, index + 1)


def _flow(node: Node, meters: dict[Node, SqnrMeter]) -> NodeFlow:
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
        return user_name(str(node.target))
    return type_name(node.target)


def joins(flows: Iterable[NodeFlow]) -> list[NodeFlow]:
    """The nodes where error from several inputs meets."""
    return [flow for flow in flows if flow.shares]
