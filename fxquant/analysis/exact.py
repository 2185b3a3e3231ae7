"""`exact`: the model's output when only one layer is quantized, for every layer and width.

The float values are computed once. For a layer, only the nodes that depend on it are run again;
what they read besides comes from the float run, whose values are freed after their last user.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.analysis.candidates import Candidate, QuantizeLinear
from fxquant.analysis.output_metric import Metric, OutputError
from fxquant.analysis.stepper import Call, HeldBytes, Stepper, deaths

Errors = dict[str, dict[int, float]]


def measure_exact(
    gm: GraphModule,
    candidates: Sequence[Candidate],
    bits: Sequence[int],
    calls: Iterable[Call],
    quantize_linear: QuantizeLinear,
    select: Callable[[Any], Tensor],
    metric: Metric = "sqnr",
    advance: Callable[[], object] = lambda: None,
) -> tuple[Errors, int]:
    """Quantize each candidate alone.

    Args:
        gm: the float graph.
        candidates: the layers.
        bits: the widths to try.
        calls: batches as `(args, kwargs)`.
        quantize_linear: makes a quantized layer from `(name, linear, bits)`.
        select: picks the tensor of the output that is compared.
        metric: of the output's error.
        advance: called after each candidate of each batch, for a progress bar.

    Returns:
        The error by name and width, and the most bytes of activations held at once.
    """
    meters = {c.name: {b: OutputError(metric) for b in bits} for c in candidates}
    peak = 0
    for call in calls:
        stepper = Stepper(gm, call)
        values: dict[Node, Any] = {}
        for node in stepper.nodes:
            values[node] = stepper.compute(node, values)
        output = stepper.nodes[-1]
        reference = select(values[output])
        for candidate in candidates:
            rerun = dependents(stepper.nodes, candidate.roots)
            stepper.free(values, stepper.nodes.index(rerun[0]))
            for width in bits:
                module = quantize_linear(candidate.name, candidate.linear, width)
                with candidate.replaced_by(module):
                    found, held = _run_suffix(stepper, rerun, values)
                meters[candidate.name][width].add(reference, select(found))
                peak = max(peak, held)
            advance()
    return {n: {b: m.value for b, m in row.items()} for n, row in meters.items()}, peak


def dependents(nodes: list[Node], roots: Sequence[Node]) -> list[Node]:
    """The nodes that a change in `roots` reaches, in order, themselves included."""
    reached = set(roots)
    for node in nodes:
        if any(argument in reached for argument in node.all_input_nodes):
            reached.add(node)
    return [node for node in nodes if node in reached]


def _run_suffix(stepper: Stepper, rerun: list[Node], kept: dict[Node, Any]) -> tuple[Any, int]:
    """Run `rerun` on top of the float values `kept`; the last value and the most bytes held."""
    again = set(rerun)
    values = {node: value for node, value in kept.items() if node not in again}
    dying = deaths(rerun)
    held = HeldBytes(kept.values())
    result = None
    for position, node in enumerate(rerun):
        result = stepper.compute(node, values)
        values[node] = result
        held.add(result)
        for done in dying[position]:
            held.remove(values.pop(done))
    return result, held.peak
