"""Run a float and a quantized model on the same input and compare them layer by layer.

For a layer F, its quantized form F_q, its float input x and the input x_q it sees in the quantized
model, the error at its output splits into two parts:

    F_q(x_q) − F(x)  =  [F_q(x_q) − F(x_q)]  +  [F(x_q) − F(x)]
        cumulative          introduced             arrived

Tokens that an attention mask calls padding are in no figure.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.distributed.parts import parts_of
from fxquant.distributed.processes import ALONE, Processes
from fxquant.graph.calls import Call
from fxquant.graph.layers import Site, layer_arguments, sites, unbatched
from fxquant.graph.left_alone import graph_left_alone
from fxquant.graph.ops import is_rearrangement
from fxquant.graph.routing import choices_of_experts
from fxquant.graph.stepper import Stepper, is_tensor
from fxquant.graph.structures import main_output
from fxquant.measure.chosen_experts import ChosenExperts
from fxquant.measure.output_metric import Metric, OutputError
from fxquant.measure.row_parts import row_parts
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.weight_forms import form_of
from fxquant.numerics.metrics import SqnrMeter
from fxquant.passes.calibrate import naming_batch, run_call
from fxquant.passes.padding import padding_mask, without_padding
from fxquant.report.progress import steps

C = TypeVar("C")
T = TypeVar("T")


@dataclass
class LayerErrors:
    """The meters of one layer, each of F_q(x_q) or F(x_q) against the float result."""

    introduced: SqnrMeter = field(default_factory=SqnrMeter)
    arrived: SqnrMeter = field(default_factory=SqnrMeter)
    cumulative: SqnrMeter = field(default_factory=SqnrMeter)

    def merge(self, other: "LayerErrors") -> None:
        """Add the errors on other batches."""
        self.introduced.merge(other.introduced)
        self.arrived.merge(other.arrived)
        self.cumulative.merge(other.cumulative)


@dataclass(frozen=True)
class PairedRun:
    """Errors by layer name, of nodes of the outermost graph, and of the model's output.

    `experts` has what routers chose, by the name of the first layer that they chose for.
    """

    layers: dict[str, LayerErrors]
    nodes: dict[Node, SqnrMeter] = field(default_factory=dict)
    output: SqnrMeter = field(default_factory=SqnrMeter)
    experts: dict[str, ChosenExperts] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Iterable[str]) -> "PairedRun":
        """A run without batches of layers of these names."""
        return cls({name: LayerErrors() for name in names})

    def merge(self, other: "PairedRun") -> None:
        """Add the errors on other batches."""
        for name, errors in other.layers.items():
            self.layers[name].merge(errors)
        for node, meter in other.nodes.items():
            self.nodes.setdefault(node, SqnrMeter()).merge(meter)
        self.output.merge(other.output)
        for name, chosen in other.experts.items():
            self.experts.setdefault(name, ChosenExperts()).merge(chosen)


@torch.no_grad()
def run_paired(
    float_gm: GraphModule,
    quantized_gm: GraphModule,
    calls: Iterable[Call],
    select: Callable[[Any], Tensor] = main_output,
    *,
    compares_nodes: bool = True,
    processes: Processes = ALONE,
) -> PairedRun:
    """Compare two graphs of the same model, node by node.

    Args:
        float_gm: the traced model.
        quantized_gm: the same graph with quantized layers; nodes have the same names.
        calls: the batches; large ones run in parts.
        select: picks the tensor of the model's output that is compared.
        compares_nodes: whether nodes that call no quantized layer are compared, too.
        processes: that share the batches, unless nodes are compared; all get the result.

    Returns:
        Signal and noise of every quantized layer that ran, of every node of `quantized_gm` with a
        floating tensor if that is wanted, and of the output. It costs the float pass, the quantized
        pass, and every quantized layer once more in float.
    """
    pairs = _layer_pairs(float_gm, quantized_gm)
    names = [name for name, _, _ in pairs]
    choices = choices_of_experts(quantized_gm)

    def over(part: Sequence[Call]) -> PairedRun:
        run = PairedRun.of(names)
        compared = _Compared(run, quantized_gm) if compares_nodes else None
        chosen = {n: run.experts.setdefault(name, ChosenExperts()) for n, name in choices.items()}
        for call in part:
            results: dict[str, list[Tensor]] = {name: [] for name in names}
            mask = padding_mask(call)
            hooks: list[tuple[nn.Module, Any]] = []
            for name, layer, quantized in pairs:
                hooks.append((layer, _record(results[name])))
                hooks.append((quantized, _compare(layer, results[name], run.layers[name], mask)))
            with (
                naming_batch(float_gm, lambda call=call: call),  # type: ignore[misc]
                _hooks(hooks),
                graph_left_alone(float_gm),
                graph_left_alone(quantized_gm),
            ):
                clean, noisy = Stepper(float_gm, call), Stepper(quantized_gm, call)
                both = _run_side_by_side(clean, noisy, mask, compared, chosen)
                run.output.add(*without_padding(mask, *map(select, both)))
        return run

    total = PairedRun.of(names)
    for run in _shared(row_parts(float_gm, calls), over, ALONE if compares_nodes else processes):
        total.merge(run)
    return total


def _shared(
    items: Iterable[C], over: Callable[[Sequence[C]], T], processes: Processes
) -> Iterable[T]:
    """What `over` says of parts of the batches, in their order; each part is one process's."""
    batches = list(items)
    parts = [batches[part.start : part.stop] for part in parts_of(len(batches))]
    tasks = [partial(over, part) for part in parts]
    return steps(processes.in_order(tasks), "measuring", total=len(tasks))


def _lone_sites(gm: GraphModule, run: PairedRun) -> list[Site]:
    """The nodes of the outermost graph that alone call a compared layer: one meter serves both."""
    calls: dict[str, list[Site]] = {}
    for site in sites(gm):
        if site.name in run.layers:
            calls.setdefault(site.name, []).append(site)
    return [found[0] for found in calls.values() if len(found) == 1 and not found[0].is_inside]


def _run_side_by_side(
    clean: Stepper,
    noisy: Stepper,
    mask: Tensor | None,
    compared: "_Compared | None",
    chosen: Mapping[Node, ChosenExperts],
) -> tuple[Any, Any]:
    """The results of both; nodes are compared if that is wanted, and choices of experts always."""
    partner = {node.name: i for i, node in enumerate(clean.nodes)}
    clean_values: dict[Node, Any] = {}
    noisy_values: dict[Node, Any] = {}
    done = 0
    for index, node in enumerate(noisy.nodes):
        place = partner.get(node.name, -1)
        while done <= place:  # float nodes first: a quantized layer looks for the float result
            clean_values[clean.nodes[done]] = clean.compute(clean.nodes[done], clean_values)
            done += 1
        noisy_values[node] = noisy.compute(node, noisy_values)
        if place >= 0:
            expected, found = clean_values[clean.nodes[place]], noisy_values[node]
            if node.op == "output":
                return expected, found
            if compared is not None:
                compared.add(node, expected, found, mask)
            if node in chosen:
                chosen[node].add(expected, found, mask)
            clean.free(clean_values, done)
        noisy.free(noisy_values, index + 1)
    raise AssertionError("a graph without an output")


class _Compared:
    """Adds up the errors of nodes, those of layers aside, which hooks compare."""

    def __init__(self, run: PairedRun, gm: GraphModule) -> None:
        self.nodes = run.nodes
        self._shared = {s.node: run.layers[s.name].cumulative for s in _lone_sites(gm, run)}

    def add(self, node: Node, expected: Any, found: Any, mask: Tensor | None) -> None:
        """Add to the meter of `node`; what only moves elements has the meter of its input."""
        if node in self._shared:
            self.nodes[node] = self._shared[node]
            return
        if not is_tensor(expected) or not is_tensor(found) or expected.shape != found.shape:
            return
        source = node.args[0] if node.args else None
        if is_rearrangement(node) and isinstance(source, Node) and source in self.nodes:
            self.nodes[node] = self.nodes[source]
            return
        meter = self.nodes.setdefault(node, SqnrMeter())
        meter.add(*without_padding(mask, expected, found))


def _layer_pairs(
    float_gm: GraphModule, quantized_gm: GraphModule
) -> list[tuple[str, nn.Module, QuantizedLayer]]:
    layers = {s.name: s.module for s in sites(float_gm) if form_of(s.module)}
    found = {}
    for site in sites(quantized_gm):
        if isinstance(site.module, QuantizedLayer) and site.name in layers:
            found[site.name] = (site.name, layers[site.name], site.module)
    return list(found.values())


def _record(results: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        results.append(unbatched(output).clone())  # what runs behind the layer may write into it

    return hook


def _compare(
    layer: nn.Module, expected: list[Tensor], errors: LayerErrors, mask: Tensor | None
) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        output = unbatched(output)
        shifted = layer.forward(*layer_arguments(args, kwargs))  # F(x_q), past all hooks
        errors.introduced.add(*without_padding(mask, shifted, output))
        if not expected:  # control flow may have taken another way
            return
        clean = expected.pop(0)  # F(x)
        if clean.shape == output.shape:
            clean, shifted, output = without_padding(mask, clean, shifted, output)
            errors.arrived.add(clean, shifted)
            errors.cumulative.add(clean, output)

    return hook


@contextmanager
def _hooks(hooks: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def output_sqnr(
    float_gm: GraphModule,
    quantized_gm: GraphModule,
    calls: Iterable[Call],
    select: Callable[[Any], Tensor] = main_output,
    processes: Processes = ALONE,
) -> SqnrMeter:
    """The error of the model's output alone, under the same random state on both sides.

    Large batches run in parts.

    Args:
        float_gm: the traced model.
        quantized_gm: its quantized form.
        calls: the batches.
        select: picks the tensor of the model's output that is compared.
        processes: that share the batches; all get the result.
    """

    def over(part: Sequence[tuple[int, Call]]) -> SqnrMeter:
        meter = SqnrMeter()
        for index, call in part:
            both = _pair(float_gm, quantized_gm, call, index, select)
            meter.add(*without_padding(padding_mask(call), *both))
        return meter

    total = SqnrMeter()
    for meter in _shared(enumerate(row_parts(float_gm, calls)), over, processes):
        total.merge(meter)
    return total


def output_error(
    float_gm: GraphModule,
    quantized_gm: GraphModule,
    calls: Iterable[Call],
    select: Callable[[Any], Tensor] = main_output,
    metric: Metric = "sqnr",
) -> float:
    """The same in a metric of `OutputError`: smaller is better."""
    meter = OutputError(metric)
    for index, call in enumerate(row_parts(float_gm, calls)):
        meter.add(*_pair(float_gm, quantized_gm, call, index, select), padding_mask(call))
    return meter.value


def _pair(
    float_gm: GraphModule,
    quantized_gm: GraphModule,
    call: Call,
    index: int,
    select: Callable[[Any], Tensor],
) -> tuple[Tensor, Tensor]:
    expected = select(run_call(float_gm, call, index))
    return expected, select(run_call(quantized_gm, call, index))
