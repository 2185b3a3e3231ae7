"""The stages of a quantization.

Trace, decide, fold, calibrate, make layers, rewrite, fuse, measure.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from torch.fx import GraphModule

from fxquant.calibration import Calibrated, calibrated_on, selected, watched
from fxquant.config.memory import memory_bytes
from fxquant.config.method import Recipe, parse_method
from fxquant.config.quant_config import DYNAMIC, QuantConfig
from fxquant.distributed.processes import ALONE, Processes
from fxquant.fusion.fuse import fuse
from fxquant.fusion.fused import fused_counts
from fxquant.graph.calls import Call
from fxquant.graph.left_alone import process_left_alone, structure_left_alone
from fxquant.measure.measured_rows import add_figures
from fxquant.measure.paired_run import output_sqnr
from fxquant.measure.quantization_info import QuantizationInfo
from fxquant.measure.sizes import MEGABYTE, model_bytes
from fxquant.modules.layer import QuantizedLayer
from fxquant.passes.calibration_data import drawn_calls
from fxquant.passes.check_alike import check_alike
from fxquant.passes.check_weights import check_has_values, check_weights
from fxquant.passes.decide import Decision, add_notes, decide
from fxquant.passes.fitted_layers import FittedLayers
from fxquant.passes.fitted_widths import FittedWidths
from fxquant.passes.fold_norms import FoldedNorm, fold_norms
from fxquant.passes.observe_inputs import InputWatcher, of_blocks
from fxquant.passes.pack_parameters import bare_layers
from fxquant.passes.quantize_activations import with_activations
from fxquant.passes.quantize_products import products_in_float, quantize_products
from fxquant.passes.quantize_sequentially import quantize_sequentially
from fxquant.passes.rewrite import chosen_layers, rewrite
from fxquant.passes.rounded_layers import RoundedLayers
from fxquant.passes.token_noise import check_has_batches
from fxquant.tracing.offload import loaded
from fxquant.tracing.prepare import check_initialized
from fxquant.tracing.trace import graph_of
from fxquant.tracing.trace_report import trace_report

ROUNDED = Recipe((), "rtn")  # what "auto" compares fitted layers with
WAITING_SHARE = 0.5  # of the memory, for values between layers; the batch and the layer in work too


@dataclass(frozen=True)
class Rewritten:
    """A graph with quantized layers.

    Attributes:
        gm: the rewritten graph.
        decisions: what the passes said about each layer.
        recipe: how the layers were made.
        method: the recipe's name; where `"auto"` took another one, with the reason.
        others: layers that were fitted in other widths besides, by name and width.
        products: how the factors of each product of two values are rounded, by node.
    """

    gm: GraphModule
    decisions: list[Decision]
    recipe: Recipe
    method: str
    others: Mapping[tuple[str, int], QuantizedLayer] = field(default_factory=dict)
    products: Mapping[str, str] = field(default_factory=dict)


def run_stages(
    model: nn.Module,
    data: Iterable[object] | None,
    config: QuantConfig,
    example: Call | None,
    *,
    memory: int | str | None = None,
    processes: Processes = ALONE,
) -> tuple[GraphModule, QuantizationInfo]:
    """Quantize a model.

    Args:
        model: any module, or a graph from `trace`.
        data: calibration data, or None.
        config: what is wanted.
        example: the call to trace the model with; by default the first of the data.
        memory: that values between layers may take, see `config/memory.py`.
        processes: that share the work; each of them calls this.

    Returns:
        The quantized graph and the record, whose accuracy nobody has judged yet.

    Raises:
        FxquantError: the model or the data is not usable.
    """
    recipe = parse_method(config.method, has_data=data is not None)
    most_bytes = memory_bytes(memory)
    model = loaded(model)
    check_initialized(model)
    check_has_values(model)
    with process_left_alone(), structure_left_alone(model):
        if data is None:
            return _quantize_without_data(model, config, recipe, example, processes)
        return _quantize_with_data(model, data, config, recipe, example, most_bytes, processes)


def _quantize_without_data(
    model: nn.Module,
    config: QuantConfig,
    recipe: Recipe,
    example: Call | None,
    processes: Processes,
) -> tuple[GraphModule, QuantizationInfo]:
    check_alike(processes, model, config, [])
    check_has_batches(config.token_noise)
    config = replace(config, observer=DYNAMIC)
    traced = graph_of(model, example)
    gm, decisions, norms = _decided(traced, config)
    watcher = InputWatcher(gm, ())
    calibrated = Calibrated(gm, decisions, [], [], [], watcher, (), processes, norms, traced)
    made = _with_activations(_round(calibrated, config, recipe), calibrated, config)
    return _measured(calibrated, made, config)


def _quantize_with_data(
    model: nn.Module,
    data: Iterable[object],
    config: QuantConfig,
    recipe: Recipe,
    example: Call | None,
    most_bytes: int | None,
    processes: Processes,
) -> tuple[GraphModule, QuantizationInfo]:
    drawn = drawn_calls(data, model, config.num_calibration_samples)
    check_alike(processes, model, config, drawn)
    traced = graph_of(model, example or (drawn[0] if drawn else None))
    gm, decisions, norms = _decided(traced, config)
    calibrated = calibrated_on(gm, decisions, drawn, config, recipe, processes)
    calibrated = replace(calibrated, norms=norms, original=traced if norms else None)
    made = make_layers(calibrated, config, recipe, most_bytes)
    return _measured(calibrated, made, config)


def _decided(
    traced: GraphModule, config: QuantConfig
) -> tuple[GraphModule, list[Decision], Sequence[FoldedNorm]]:
    """The graph with its norms folded, the decisions, and these norms."""
    decisions = decide(traced, config)
    check_weights(traced, selected(decisions))
    made = fold_norms(traced, decisions)
    return made.gm, made.decisions, made.folded


def run_part(
    gm: GraphModule,
    decisions: list[Decision],
    fitted: Sequence[Call],
    held_out: Sequence[Call],
    config: QuantConfig,
    *,
    noisy: Sequence[Call] | None = None,
    most_bytes: int | None = None,
    processes: Processes = ALONE,
) -> tuple[GraphModule, list[Decision]]:
    """Quantize the layers of a part of a model, on calls of that part.

    Args:
        gm: the part, traced; its layers have their names in the whole model.
        decisions: on its layers.
        fitted: calls of the part in the float model; they choose the integers.
        held_out: calls that choose none.
        config: what is wanted; its method scales no channels, and activations stay float.
        noisy: what the part is called with in the quantized model in the place of `fitted` and
            then `held_out`; None: the same.
        most_bytes: of values that wait between layers in memory; None: no bound.
        processes: that share the work.

    Returns:
        The rewritten graph, and what there is to say of each layer.

    Raises:
        CalibrationError: the part does not take a call, or a layer reads NaN or Inf.
        WeightError: a weight cannot be quantized; the layer is named.
    """
    recipe = parse_method(config.method, has_data=True)
    check_weights(gm, selected(decisions))
    calibrated = watched(gm, decisions, fitted, held_out, config, recipe, processes=processes)
    made = _fit(calibrated, config, recipe, most_bytes, noisy)
    return made.gm, made.decisions


def make_layers(
    calibrated: Calibrated,
    config: QuantConfig,
    recipe: Recipe,
    most_bytes: int | None = None,
    also: Iterable[int] = (),
) -> Rewritten:
    """The rewritten graph of a method; `"auto"` looks which of two is better.

    Whether fitting pays is known only afterwards, on rows that it did not see: where layers that
    are rounded alone give the better output there, `"auto"` takes these.

    Args:
        calibrated: the float graph and its data.
        config: what is wanted.
        recipe: of its method.
        most_bytes: of values that wait between layers in memory; None: no bound.
        also: widths that layers that are fitted get besides, see `FittedWidths`.

    Raises:
        CalibrationError: the graph does not take a batch, or a layer reads NaN or Inf.
        WeightError: a weight cannot be quantized; the layer is named.
    """
    gm, held_out = calibrated.gm, calibrated.held_out
    fitted = _fit(calibrated, config, recipe, most_bytes, also=also)
    made = _with_activations(fitted, calibrated, config)
    if config.method != "auto" or not held_out or not selected(calibrated.decisions):
        return made
    rounded = _with_activations(_round(calibrated, config, ROUNDED), calibrated, config)
    fitted_db, rounded_db = (
        output_sqnr(gm, m.gm, held_out, processes=calibrated.processes).db for m in (made, rounded)
    )
    if rounded_db > fitted_db:
        why = f"better than gptq: {fitted_db:.2f} dB on held-out data"
        return replace(rounded, method=f"rtn ({why})")
    return made


def _fit(
    calibrated: Calibrated,
    config: QuantConfig,
    recipe: Recipe,
    most_bytes: int | None,
    noisy: Sequence[Call] | None = None,
    also: Iterable[int] = (),
) -> Rewritten:
    """The rewritten graph, with layers that are fitted to the data or rounded with its help."""
    decisions = calibrated.decisions
    if recipe.rounding != "gptq" or not selected(decisions):
        return _round(calibrated, config, recipe)
    layers = FittedLayers(config, refined=recipe.refined, bare=bare_layers(calibrated.gm))
    fitter = FittedWidths(layers, also)
    gm = quantize_sequentially(
        calibrated.gm,
        decisions,
        calibrated.choosing,
        fitter,
        calibrated.held_out,
        calibrated.watcher,
        noisy=noisy,
        most_bytes=None if most_bytes is None else int(most_bytes * WAITING_SHARE),
        processes=calibrated.processes,
    )
    return Rewritten(gm, layers.explain(decisions), recipe, recipe.name, fitter.others)


def _round(calibrated: Calibrated, config: QuantConfig, recipe: Recipe) -> Rewritten:
    """The rewritten graph, with each layer rounded on its own."""
    rounding = "rtn" if recipe.rounding == "gptq" else recipe.rounding
    bare = bare_layers(calibrated.gm)
    layers = RoundedLayers(config, rounding, calibrated.inputs, bare=bare)
    if calibrated.processes.count > 1:
        chosen = chosen_layers(calibrated.gm, calibrated.decisions).items()
        layers.share([(name, m, bits) for m, (name, bits) in chosen], calibrated.processes)
    qmodel = rewrite(calibrated.gm, calibrated.decisions, layers.quantize)
    return Rewritten(qmodel, layers.explain(calibrated.decisions), recipe, recipe.name)


def _with_activations(made: Rewritten, calibrated: Calibrated, config: QuantConfig) -> Rewritten:
    """The same with quantized activations, if they were asked for."""
    if config.activation_bits is None:
        return made
    watcher, is_dynamic = calibrated.watcher, config.observer == DYNAMIC
    statistics = of_blocks(watcher.statistics)
    gm, notes = with_activations(made.gm, watcher.observers, statistics, is_dynamic)
    products = products_in_float(gm)
    if config.activation_products:
        observer = None if is_dynamic else config.observer
        gm, products = quantize_products(gm, calibrated.fitted, observer, calibrated.processes)
    return replace(made, gm=gm, decisions=add_notes(made.decisions, notes), products=products)


def _measured(
    calibrated: Calibrated, made: Rewritten, config: QuantConfig
) -> tuple[GraphModule, QuantizationInfo]:
    """The graph, fused if that is wanted, and the record.

    It is measured on what was held out and, of the output, on what was fitted to.
    """
    result = fuse(made.gm, share_memory=True) if config.fuse else made.gm
    gm, held_out, fitted = calibrated.gm, calibrated.held_out, calibrated.fitted
    original = calibrated.original or gm
    info = QuantizationInfo(
        made.decisions,
        config=config,
        method=made.method,
        calibration_samples_used=sum(call.row_count for call in (*fitted, *held_out)),
        heldout_samples=sum(call.row_count for call in held_out),
        folded_scales=list(calibrated.folded),
        folded_norms=list(calibrated.norms),
        original_size_mb=model_bytes(original) / MEGABYTE,
        products=dict(made.products),
        fused=fused_counts(result),
        quantized_size_mb=model_bytes(result) / MEGABYTE,
        trace=trace_report(gm).to_dict(),
    )
    if info.selected_layers:
        observers = calibrated.watcher.observers
        add_figures(
            info, gm, made.gm, fitted, held_out, observers, original, result, calibrated.processes
        )
    return result, info
