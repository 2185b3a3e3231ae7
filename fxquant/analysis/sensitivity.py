"""`sensitivity`: which layer hurts, by three methods in one report."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm import tqdm

from fxquant.analysis.allocation import pareto
from fxquant.analysis.candidates import Candidate, find_candidates
from fxquant.analysis.exact import Errors, measure_exact
from fxquant.analysis.flow import error_flow
from fxquant.analysis.gradient import measure_gradient
from fxquant.analysis.memory_plan import plan_exact
from fxquant.analysis.saved_sizes import with_sizes
from fxquant.analysis.sensitivity_report import SensitivityReport
from fxquant.analysis.shipped_layers import ShippedLayers, shipped_layers
from fxquant.config.method import UNSCALED
from fxquant.config.option_checks import FLOAT_BITS
from fxquant.config.quant_config import QuantConfig
from fxquant.config.targets import TARGETS
from fxquant.distributed.processes import ALONE, Processes
from fxquant.errors import OptionError, check_choice, check_positive_int, check_type
from fxquant.graph.calls import Call
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.left_alone import process_left_alone, structure_left_alone
from fxquant.graph.structures import main_output
from fxquant.measure.measured_rows import measure_rows
from fxquant.measure.output_metric import Metric, db_of
from fxquant.measure.paired_run import output_error
from fxquant.measure.sensitivity_row import SensitivityRow
from fxquant.measure.sizes import model_bytes
from fxquant.numerics.integers import WIDTHS
from fxquant.passes.calibration_data import calls, check_batches
from fxquant.passes.check_alike import check_alike
from fxquant.passes.check_weights import check_weights
from fxquant.passes.decide import ACTIONS, Decision, decide
from fxquant.passes.fold_norms import fold_norms
from fxquant.passes.rewrite import rewrite
from fxquant.report.progress import is_shown
from fxquant.tracing.offload import loaded
from fxquant.tracing.trace import graph_of
from fxquant.view.graph_view import to_networkx

Analysis = Literal["local", "exact", "gradient"]
METHODS: tuple[Analysis, ...] = get_args(Analysis)


def sensitivity(
    model: nn.Module,
    data: Iterable[object],
    *,
    bits: int = 4,
    group_size: int = 128,
    method: Analysis = "local",
    analysis: Analysis | None = None,
    rounding: str | None = None,
    symmetric: bool = True,
    zero_points: str = "float",
    code_book: str | None = None,
    target: str | None = None,
    embeddings: int | None = None,
    metric: Metric = "sqnr",
    select: Callable[[Any], Tensor] = main_output,
    modules_to_not_convert: Sequence[str] | None = None,
    skip_layer_names: Sequence[str] | None = None,
    skip_param_threshold: int | None = None,
    num_samples: int = 150,
    progress: bool | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> SensitivityReport:
    """Measure what quantizing each layer costs.

    The layers are those that `static_quantize` would ship. Part of the data is held out when they
    are made, and everything is measured on that part alone.

    Args:
        model: any module, or a graph from `trace`; it is not changed.
        data: calibration data in any of the forms of `static_quantize`.
        bits: 2, 3, 4, 5, 6 or 8: the width that figures of single layers are of.
        group_size: weights along `in_features` that share a scale.
        method: `"local"`: one paired pass over the float and the quantized graph splits each
            node's error into what it introduced and what arrived, and follows it through every
            node. `"exact"`: the output when only this layer is quantized, at each width.
            `"gradient"`: an estimate of that for all layers and widths from one forward and a few
            backwards.
        analysis: another name of `method`, for those who call the rounding a method; where it is
            given it counts.
        rounding: the method that makes the layers: `"rtn"`, `"hqq"`, `"gptq"`, `"best"`, or
            `"auto"`, as in `static_quantize`; None is `"auto"`. With `"rtn"` no layer is fitted to
            the data, which is much faster.
        symmetric: one fixed zero point, or one for each group.
        zero_points: `"float"` or `"integer"`, as in `QuantConfig`.
        code_book: of weights of 4 bits, as in `QuantConfig`.
        target: a format that the model will be exported to, as in `QuantConfig`.
        embeddings: bits of the rows of embeddings, which are measured too; None leaves them float.
        metric: of the output's error: `"sqnr"`, `"kl"` where the output is logits, or (with
            `"exact"`) a callable `(float, quantized) -> number`, smaller is better.
        select: picks the tensor of the model's output; by default its first floating tensor.
        modules_to_not_convert: names that stay float.
        skip_layer_names: replaces `DEFAULT_INT4_SKIP.skip_names`.
        skip_param_threshold: replaces `DEFAULT_INT4_SKIP.skip_param_threshold`.
        num_samples: rows of the first dimension that are used at most.
        progress: show a progress bar and, before an exact run, the memory plan; by default on a
            terminal only.
        group: of processes that share the work, as in `quantize`: layers are made as there, and
            `"exact"` shares the layers that it measures. The report is the same.

    Returns:
        One row for each layer that `static_quantize` would quantize.

    Raises:
        ProcessGroupError: another process of the group has failed.
    """
    if analysis is not None:
        check_choice("analysis", analysis, METHODS)
        method = analysis
    check_choice("method", method, METHODS)
    rounding = "auto" if rounding is None else rounding
    check_choice("rounding", rounding, UNSCALED)
    options = QuantConfig(
        bits=bits,
        embeddings=embeddings,
        group_size=group_size,
        symmetric=symmetric,
        zero_points=zero_points,
        code_book=code_book,
        target=target,
        modules_to_not_convert=modules_to_not_convert,
        skip_layer_names=skip_layer_names,
        skip_param_threshold=skip_param_threshold,
    )
    if isinstance(options.bits, Mapping):
        raise OptionError(
            "bits",
            found="a mapping",
            needed="one width, which figures of single layers are of",
            remedy="Pass one of 2, 3, 4, 5, 6 and 8.",
        )
    processes = Processes.of(group)
    with processes.together():
        check_positive_int("num_samples", num_samples)
        return measured_sensitivity(
            model, data, options, method=method, rounding=rounding, metric=metric,
            select=partial(_selected, select),
            num_samples=num_samples, progress=progress, processes=processes,
        )  # fmt: skip


def _selected(select: Callable[[Any], Tensor], output: Any) -> Tensor:
    """What the caller picks of the model's output."""
    tensor = select(output)
    check_type("select's result", tensor, Tensor, "Let select return a tensor.")
    return tensor


def measured_sensitivity(
    model: nn.Module,
    data: Iterable[object],
    options: QuantConfig,
    *,
    method: str,
    rounding: str,
    num_samples: int,
    metric: Metric = "sqnr",
    select: Callable[[Any], Tensor] = main_output,
    progress: bool | None = None,
    processes: Processes = ALONE,
) -> SensitivityReport:
    """What `sensitivity` does in each of the processes that share it.

    Args:
        model: as there, like `data`, `method`, `rounding`, `metric`, `select`, `num_samples` and
            `progress`.
        data: see there.
        options: how layers are quantized.
        method: see there.
        rounding: see there.
        num_samples: see there.
        metric: see there.
        select: see there.
        progress: see there.
        processes: that share the work; what they were given is compared.
    """
    model = loaded(model)
    with process_left_alone(), structure_left_alone(model):
        return _measured(
            model, data, options, method, rounding, metric, select, num_samples,
            progress, processes,
        )  # fmt: skip


def _measured(
    model: nn.Module,
    data: Iterable[object],
    options: QuantConfig,
    method: str,
    rounding: str,
    metric: Metric,
    select: Callable[[Any], Tensor],
    num_samples: int,
    progress: bool | None,
    processes: Processes,
) -> SensitivityReport:
    batches = list(calls(data, model, num_samples))
    check_alike(processes, model, options, batches)
    check_batches(batches)
    traced = graph_of(model, batches[0])
    gm = copy_sharing_tensors(traced, frozen=True)
    decisions = decide(gm, options)
    check_weights(gm, [d.module for d in decisions if d.bits is not None])
    norms = fold_norms(gm, decisions)
    gm, decisions = norms.gm, norms.decisions
    if method == "local" and options.bits == 8:  # there is one way to make these
        rounding = "rtn"
    assert isinstance(options.bits, int)  # sensitivity takes one width
    known = TARGETS[options.target].widths if options.target else WIDTHS
    widths = sorted({*known, options.bits})
    others = () if method == "local" else widths
    layers = shipped_layers(
        gm,
        decisions,
        batches,
        rounding=rounding,
        config=options,
        widths=others,
        processes=processes,
    )
    qmodel = rewrite(gm, decisions, layers.quantize)
    rows, run = measure_rows(gm, qmodel, decisions, layers.held_out)
    candidates = find_candidates(gm, [row.module for row in rows])
    rows = _with_shared(rows, candidates)
    rows = with_sizes(gm, rows, candidates, widths, layers.quantize, options, norms.saved_bytes)
    evaluation = _Evaluation(gm, decisions, layers, select, metric)
    report = SensitivityReport(
        rows,
        method,
        run.output.db_or_none,
        metric=metric if isinstance(metric, str) else "custom",
        decisions=[asdict(d) for d in decisions],
        graph=to_networkx(qmodel, {row.module: asdict(row) for row in rows}),
        evaluate=evaluation,
        evaluate_error=evaluation.error,
        rounding=layers.rounding,
        samples=sum(call.row_count for call in batches),
        heldout_samples=layers.heldout_samples,
        other_bytes=model_bytes(gm, without={candidate.layer for candidate in candidates}),
    )
    if method == "local":
        return replace(report, flows=error_flow(run.nodes))
    shown = is_shown(progress)
    measurement = _Measurement(
        gm, candidates, widths, layers.held_out, layers, select, metric, shown, processes
    )
    errors, peak = measurement.run(method)
    report = replace(report, rows=[_with_errors(r, errors, report) for r in rows], peak_bytes=peak)
    return replace(report, pareto=_predicted_pareto(report))


@dataclass(frozen=True)
class _Measurement:
    """What both methods that look at the output need."""

    gm: GraphModule
    candidates: list[Candidate]
    widths: Sequence[int]
    batches: list[Call]
    layers: ShippedLayers
    select: Callable[[Any], Tensor]
    metric: Metric
    is_shown: bool
    processes: Processes

    def run(self, method: str) -> tuple[Errors, int | None]:
        """Errors by name and width, and the most bytes held where that was counted."""
        runs = len(self.candidates) // self.processes.count if method == "exact" else 1
        steps = len(self.batches) * runs
        with tqdm(total=steps, desc=method, disable=not self.is_shown) as bar:
            arguments = (
                self.gm, self.candidates, self.widths, self.batches, self.layers.quantize,
                self.select, self.metric, bar.update,
            )  # fmt: skip
            if method == "gradient":
                return measure_gradient(*arguments), None
            if self.is_shown:
                rows = max((b.row_count for b in self.batches), default=1)
                bar.write(str(plan_exact(self.gm, self.candidates, rows)), file=sys.stderr)
            return measure_exact(*arguments, processes=self.processes)


def _predicted_pareto(report: SensitivityReport) -> list[tuple[float, float]]:
    if report.metric != "sqnr" or not report.rows:
        return []
    points = pareto(replace(report, evaluate=None))
    return [(p.average_bits, p.predicted_sqnr_db or 0.0) for p in points]


def _with_errors(row: SensitivityRow, errors: Errors, report: SensitivityReport) -> SensitivityRow:
    found = {bits: e for bits, e in errors[row.module].items() if bits in row.saved_bytes}
    output = db_of(found[row.bits]) if report.metric == "sqnr" else None
    return replace(row, output_errors=found, output_sqnr_db=output)


def _with_shared(
    rows: Sequence[SensitivityRow], candidates: Sequence[Candidate]
) -> list[SensitivityRow]:
    """The rows, and which of them read one value or share a weight."""
    # Of the weights themselves, which live on; a matrix made of one is gone at once, and its
    # address may be the next one's.
    weights: dict[int, str] = {}
    inputs = {c.name: weights.setdefault(_address(c.layer), c.shares) for c in candidates}
    places = {c.name: _place(c.layer) for c in candidates}
    first: dict[tuple[Any, ...], str] = {}
    owners = {row.module: first.setdefault(places[row.module], row.module) for row in rows}
    return [
        replace(
            row,
            shares_input=inputs[row.module],
            shares_weight=owners[row.module] if owners[row.module] != row.module else "",
        )
        for row in rows
    ]


def _address(layer: nn.Module) -> int:
    return layer.get_parameter("weight").data_ptr()


def _place(layer: nn.Module) -> tuple[Any, ...]:
    weight = layer.get_parameter("weight")
    return weight.data_ptr(), tuple(weight.shape), weight.stride()


class _Evaluation:
    """Runs an allocation with the layers that were measured, on the data that was held out."""

    def __init__(
        self,
        gm: GraphModule,
        decisions: Sequence[Decision],
        layers: ShippedLayers,
        select: Callable[[Any], Tensor],
        metric: Metric,
    ) -> None:
        self.gm, self.decisions, self.layers, self.select = gm, decisions, layers, select
        self.metric = metric

    def __call__(self, bits: dict[str, int]) -> float:
        """Output SQNR with the layers of `bits` at these widths and all others float."""
        return db_of(self._error(bits, "sqnr"))

    def error(self, bits: dict[str, int]) -> float:
        """The same in the report's metric: smaller is better."""
        return self._error(bits, self.metric)

    @torch.no_grad()
    def _error(self, bits: dict[str, int], metric: Metric) -> float:
        planned = [
            replace(d, action=ACTIONS[bits.get(d.module, FLOAT_BITS)]) for d in self.decisions
        ]
        qmodel = rewrite(self.gm, planned, self.layers.quantize)
        return output_error(self.gm, qmodel, self.layers.held_out, self.select, metric)
