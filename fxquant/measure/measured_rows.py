"""The table of what each quantized layer cost, from one paired run."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.fx import GraphModule

from fxquant.distributed.processes import ALONE, Processes
from fxquant.graph.calls import Call
from fxquant.graph.layers import sites
from fxquant.measure.paired_run import LayerErrors, PairedRun, output_sqnr, run_paired
from fxquant.measure.quantization_info import QuantizationInfo
from fxquant.measure.row_parts import leading_rows
from fxquant.measure.sensitivity_row import SensitivityRow
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.weight_forms import form_of, matrix_of
from fxquant.numerics.metrics import SqnrMeter
from fxquant.observers import Observer
from fxquant.passes.decide import Decision


def measure_rows(
    float_gm: GraphModule,
    quantized_gm: GraphModule,
    decisions: Iterable[Decision],
    calls: Iterable[Call] = (),
    observers: Mapping[str, Observer] | None = None,
    *,
    compares_nodes: bool = True,
    processes: Processes = ALONE,
) -> tuple[list[SensitivityRow], PairedRun]:
    """The cost of each quantized layer, by one paired pass over `calls`.

    Args:
        float_gm: the traced model.
        quantized_gm: its rewritten form.
        decisions: from `decide`.
        calls: batches; without any, only weights are compared.
        observers: the calibrated observer of each layer's input.
        compares_nodes: whether the run compares nodes that call no quantized layer, too.
        processes: that share the batches, unless nodes are compared.

    Returns:
        One row for each quantized layer, and the paired run with the output's errors.
    """
    run = run_paired(
        float_gm, quantized_gm, calls, compares_nodes=compares_nodes, processes=processes
    )
    layers = {s.name: s.module for s in sites(float_gm) if form_of(s.module)}
    quantized = {
        s.name: s.module for s in sites(quantized_gm) if isinstance(s.module, QuantizedLayer)
    }
    watched = observers or {}
    return [
        _row(d, layers[d.module], quantized[d.module], run.layers[d.module], watched.get(d.module))
        for d in decisions
        if d.module in quantized
    ], run


def add_figures(
    info: QuantizationInfo,
    float_gm: GraphModule,
    quantized_gm: GraphModule,
    fitted: Sequence[Call],
    held_out: Sequence[Call],
    observers: Mapping[str, Observer],
    original: GraphModule,
    result: GraphModule,
    processes: Processes = ALONE,
) -> None:
    """Write what the layers and the output cost into a record that has its decisions.

    Args:
        info: the record; it is changed.
        float_gm: the float graph that was rewritten.
        quantized_gm: its rewritten form.
        fitted: the batches that chose the integers.
        held_out: those that chose none; all is measured on them, where there are any.
        observers: the calibrated observer of each layer's input.
        original: the graph before norms were folded into it. They are rounded to the dtype of
            parameters there, so that the output is compared with this one.
        result: the graph that the caller gets: the rewritten form, or that fused.
        processes: that share the batches; the figures do not depend on how many there are.
    """
    calls = held_out or fitted
    info.rows, run = measure_rows(
        float_gm, quantized_gm, info.decisions, calls, observers,
        compares_nodes=False, processes=processes,
    )  # fmt: skip
    info.changed_experts = {
        name: seen.changed / seen.tokens for name, seen in run.experts.items() if seen.tokens
    }
    is_same = original is float_gm and result is quantized_gm
    output = run.output if is_same else output_sqnr(original, result, calls, processes=processes)
    info.sqnr_db = info.fitted_sqnr_db = output.db_or_none
    if held_out:
        as_many = leading_rows(fitted, info.heldout_samples)
        meter = output_sqnr(original, result, as_many, processes=processes)
        info.fitted_sqnr_db = meter.db_or_none


def _row(
    decision: Decision,
    layer: nn.Module,
    quantized: QuantizedLayer,
    errors: LayerErrors,
    observer: Observer | None,
) -> SensitivityRow:
    seen = observer.statistics() if observer is not None and observer.has_seen_values else None
    return SensitivityRow(
        module=decision.module,
        kind=decision.kind,
        shape=decision.shape,
        params=decision.parameters,
        bits=quantized.bits,
        weight_sqnr_db=weight_sqnr_db(layer, quantized),
        introduced_sqnr_db=errors.introduced.db_or_none,
        cumulative_sqnr_db=errors.cumulative.db_or_none,
        arrived_sqnr_db=errors.arrived.db_or_none,
        input_low=seen.low if seen else None,
        input_high=seen.high if seen else None,
        input_outlier_ratio=seen.outlier_ratio if seen else None,
    )


def weight_sqnr_db(layer: nn.Module, quantized: QuantizedLayer) -> float:
    """SQNR of a layer's weight in dB."""
    meter, start, matrix = SqnrMeter(), 0, matrix_of(layer)
    for part in quantized.weight_parts():
        meter.add(matrix[start : start + len(part)], part)
        start += len(part)
    return meter.db
