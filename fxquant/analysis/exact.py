"""`exact`: the model's output when only one layer is quantized, for every layer and width.

Graphs that write in place, keep state or draw random numbers are run whole for each candidate. In
others, the float values are computed once. For a layer, only the nodes that depend on it are run
again; what they read besides comes from the float run, whose values are freed after their last
user. Where activations are small, all widths of a layer run at once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.analysis.batching import (
    RepeatedValues,
    compute_parts,
    is_same_error,
    repeated_values,
)
from fxquant.analysis.candidates import Candidate
from fxquant.distributed.parts import parts_of
from fxquant.distributed.processes import ALONE, Processes
from fxquant.graph.calls import Call
from fxquant.graph.effects import has_effects
from fxquant.graph.stepper import HeldBytes, Stepper, last_used_at
from fxquant.measure.output_metric import Metric, OutputError
from fxquant.modules.layer import QuantizedLayer
from fxquant.passes.calibrate import run_call
from fxquant.passes.padding import padding_mask
from fxquant.passes.rewrite import QuantizeLayer

Errors = dict[str, dict[int, float]]


def measure_exact(
    gm: GraphModule,
    candidates: Sequence[Candidate],
    bits: Sequence[int],
    calls: Sequence[Call],
    quantize_layer: QuantizeLayer,
    select: Callable[[Any], Tensor],
    metric: Metric = "sqnr",
    advance: Callable[[], object] = lambda: None,
    processes: Processes = ALONE,
) -> tuple[Errors, int]:
    """Quantize each candidate alone.

    Args:
        gm: the float graph.
        candidates: the layers.
        bits: the widths to try.
        calls: the batches.
        quantize_layer: makes a quantized layer from `(name, layer, bits)`.
        select: picks the tensor of the output that is compared.
        metric: of the output's error.
        advance: called after each candidate of each batch, for a progress bar.
        processes: that share the layers; the result is the same, bit for bit.

    Returns:
        The error by name and width, and the most bytes of activations held at once.
    """
    # What is found out about one run of layers says nothing of the next one, so that a result does
    # not depend on which process measures which of them.
    runs = [candidates[part.start : part.stop] for part in parts_of(len(candidates))]
    tasks = [
        _Measuring(gm, runs[i :: processes.count], bits, quantize_layer, select, metric, advance)
        for i in range(processes.count)
    ]
    errors, peak = Errors(), 0
    for found, held in processes.in_order([partial(task.over, calls) for task in tasks]):
        errors |= found
        peak = max(peak, held)
    return {c.name: errors[c.name] for c in candidates}, peak


class _Measuring:
    """Measures some runs of candidates, in the order of the graph."""

    def __init__(
        self,
        gm: GraphModule,
        runs: Sequence[Sequence[Candidate]],
        bits: Sequence[int],
        quantize_layer: QuantizeLayer,
        select: Callable[[Any], Tensor],
        metric: Metric,
        advance: Callable[[], object],
    ) -> None:
        self.gm, self.runs, self.bits, self.select = gm, runs, bits, select
        self.quantize_layer, self.advance = quantize_layer, advance
        self.meters = {c.name: {b: OutputError(metric) for b in bits} for run in runs for c in run}
        self.peak = 0

    def over(self, calls: Sequence[Call]) -> tuple[Errors, int]:
        """The errors over all batches, and the most bytes held."""
        # In a graph with effects, a part run again may see what another run wrote.
        measure = self._measure_whole if has_effects(self.gm) else self._measure_suffixes
        for index, call in enumerate(calls):
            measure(index, call)
        errors = {n: {b: m.value for b, m in row.items()} for n, row in self.meters.items()}
        return errors, self.peak

    def _measure_whole(self, index: int, call: Call) -> None:
        """Run the whole graph for each candidate."""
        mask = padding_mask(call)
        reference = self.select(run_call(self.gm, call, index))
        for candidate in (c for run in self.runs for c in run):
            for width in self.bits:
                made = self.quantize_layer(candidate.name, candidate.layer, width)
                with candidate.replaced_by(made):
                    found = self.select(run_call(self.gm, call, index))
                self.meters[candidate.name][width].add(reference, found, mask)
            self.advance()

    def _measure_suffixes(self, index: int, call: Call) -> None:
        """Run what depends on a candidate on top of the float values."""
        stepper = Stepper(self.gm, call)
        values: dict[Node, Any] = {}
        for node in stepper.nodes:
            values[node] = stepper.compute(node, values)
        reference = self.select(values[stepper.nodes[-1]])
        repeated = repeated_values(stepper, values, len(self.bits))
        for run in self.runs:
            self._measure_run(run, stepper, values, call, reference, repeated)

    def _measure_run(
        self,
        run: Sequence[Candidate],
        stepper: Stepper,
        values: dict[Node, Any],
        call: Call,
        reference: Tensor,
        repeated: RepeatedValues | None,
    ) -> None:
        verified: set[Node] = set()
        for candidate in run:
            rerun = dependents(stepper.nodes, candidate.roots)
            stepper.free(values, stepper.nodes.index(rerun[0]))
            modules = [self.quantize_layer(candidate.name, candidate.layer, b) for b in self.bits]
            results, held = _run_widths(stepper, candidate, rerun, values, repeated, modules)
            if repeated is not None and not verified.issuperset(rerun):
                plain, _ = _run_widths(stepper, candidate, rerun, values, None, modules)
                if is_same_error(reference, map(self.select, plain), map(self.select, results)):
                    verified.update(rerun)
                else:  # some node mixes the rows of the runs
                    repeated, results = None, plain
            for width, result in zip(self.bits, results, strict=True):
                found = self.select(result)
                self.meters[candidate.name][width].add(reference, found, padding_mask(call))
            self.peak = max(self.peak, held)
            self.advance()


def dependents(nodes: list[Node], roots: Sequence[Node]) -> list[Node]:
    """The nodes that a change in `roots` reaches, in order, themselves included."""
    reached = set(roots)
    for node in nodes:
        if any(argument in reached for argument in node.all_input_nodes):
            reached.add(node)
    return [node for node in nodes if node in reached]


def _run_widths(
    stepper: Stepper,
    candidate: Candidate,
    rerun: list[Node],
    values: dict[Node, Any],
    repeated: RepeatedValues | None,
    modules: Sequence[QuantizedLayer],
) -> tuple[list[Any], int]:
    """The model's output with each of `modules` in the candidate's place, and the bytes held."""
    if repeated is None:
        results, peak = [], 0
        for module in modules:
            with candidate.replaced_by(module):
                result, held = _run_suffix(stepper, rerun, values)
            results.append(result)
            peak = max(peak, held)
        return results, peak
    contexts = [partial(candidate.replaced_by, module) for module in modules]

    def compute(node: Node, known: dict[Node, Any]) -> Any:
        if node in candidate.roots:
            return compute_parts(stepper, node, known, repeated, contexts)
        return stepper.compute(node, known)

    kept = {node: repeated.values[node] for node in values}
    result, held = _run_suffix(stepper, rerun, kept, compute)
    return [repeated.part(rerun[-1], result, i) for i in range(len(modules))], held


def _run_suffix(
    stepper: Stepper,
    rerun: list[Node],
    kept: dict[Node, Any],
    compute: Callable[[Node, dict[Node, Any]], Any] | None = None,
) -> tuple[Any, int]:
    """Run `rerun` on top of the float values `kept`; the last value and the most bytes held."""
    again = set(rerun)
    values = {node: value for node, value in kept.items() if node not in again}
    dying = last_used_at(rerun)
    held = HeldBytes(kept.values())
    result = None
    for position, node in enumerate(rerun):
        result = (compute or stepper.compute)(node, values)
        values[node] = result
        held.add(result)
        for done in dying[position]:
            held.remove(values.pop(done))
    return result, held.peak
