"""The pipeline: trace, decide, observe, calibrate, scale, rewrite, report."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxquant.config.method import Recipe, parse_method
from fxquant.errors import OptionError, check_choice, check_positive_int
from fxquant.graph.calls import Call
from fxquant.graph.left_alone import process_left_alone, structure_left_alone
from fxquant.measure.heldout import hold_out
from fxquant.measure.measured_rows import measure_rows
from fxquant.measure.paired_run import output_sqnr
from fxquant.measure.quantization_info import INFO_KEY, QuantizationInfo, check_accuracy_warnings
from fxquant.measure.sizes import MEGABYTE, model_bytes
from fxquant.modules.linear import QuantizedLinear
from fxquant.observers import OBSERVERS, Observer
from fxquant.observers.input_statistics import InputStatistics
from fxquant.passes.calibrate import accepts, calibrate
from fxquant.passes.calibration_data import calls, check_batches
from fxquant.passes.check_weights import check_weights
from fxquant.passes.decide import DecisionOptions, decide
from fxquant.passes.fitted_layers import FittedLayers
from fxquant.passes.insert_observers import insert_observers, observed_inputs
from fxquant.passes.observe_inputs import expected_inputs, observe_inputs
from fxquant.passes.quantize_activations import quantize_activations
from fxquant.passes.quantize_sequentially import quantize_sequentially
from fxquant.passes.rewrite import rewrite
from fxquant.passes.rounded_layers import RoundedLayers
from fxquant.passes.scale_channels import scale_channels
from fxquant.passes.simulate import DYNAMIC, SimulatedActivations, SimulatedWeights
from fxquant.tracing.prepare import check_initialized, unwrap
from fxquant.tracing.trace import graph_of
from fxquant.tracing.trace_report import trace_report


def static_quantize(
    model: nn.Module,
    calibration_data: Iterable[object],
    *,
    bits: int | Mapping[str, int] = 4,
    group_size: int = 128,
    symmetric: bool = True,
    method: str = "auto",
    observer: str = "minmax",
    activation_bits: int | None = None,
    layer_types: Sequence[Any] | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    skip_layer_types: Sequence[Any] | None = None,
    skip_layer_names: Sequence[str] | None = None,
    skip_param_threshold: int | None = None,
    num_calibration_samples: int = 150,
    accuracy_warning: str = "warn",
    sqnr_warning_threshold: float = 20.0,
    sqnr_error_threshold: float = 10.0,
) -> tuple[GraphModule, QuantizationInfo]:
    """Quantize a model with calibration data.

    Args:
        model: any module, or a graph from `trace`; it is not changed.
        calibration_data: an iterable of items: a tensor (one argument), a tuple or list
            (positional arguments) or a mapping (keyword arguments). The first item also serves as
            example inputs for tracing.
        bits: 4, 8, or a mapping from module name to bits (16 leaves it float).
        group_size: weights along `in_features` that share a scale.
        symmetric: one fixed zero point, or one for each group.
        method: how to choose the integers: `"rtn"` (rounding to nearest, with a clip search
            weighted by the data), `"hqq"` (half-quadratic, without data), `"gptq"` (fitted to the
            data, layer by layer); `"awq"` or `"smoothquant"` (channel scales folded into the
            graph, then `"rtn"`); some of these joined by `+`, as in `"smoothquant+gptq"`;
            `"best"` (`"gptq"`, then refined); or `"auto"`, which is `"gptq"`.
        observer: the observer of activations, a name that `create_observer` knows, or
            `"dynamic"`: with `activation_bits=8`, ranges are found while the model runs, one for
            each token and group.
        activation_bits: 8 quantizes the inputs of quantized layers: by quantize/dequantize nodes
            in the graph (a range for each channel, within the one that the observer gives the
            value), or inside the layers if `observer="dynamic"`. None leaves them float.
        layer_types: quantize only these classes.
        modules_to_not_convert: names that stay float, on top of the skip rules.
        skip_layer_types: replaces `DEFAULT_INT4_SKIP.skip_types`.
        skip_layer_names: replaces `DEFAULT_INT4_SKIP.skip_names`.
        skip_param_threshold: replaces `DEFAULT_INT4_SKIP.skip_param_threshold`.
        num_calibration_samples: rows of the first dimension that are used at most.
        accuracy_warning: `"warn"`, `"error"` or `"ignore"`.
        sqnr_warning_threshold: in dB.
        sqnr_error_threshold: in dB.

    Returns:
        The quantized graph, and the record of what was done.

    Raises:
        FxquantError: an option, the model or the data is not usable; nothing is half done.
    """
    options = DecisionOptions(
        bits,
        group_size,
        layer_types,
        modules_to_not_convert,
        skip_layer_types,
        skip_layer_names,
        skip_param_threshold,
    )
    recipe = parse_method(method, has_data=True)
    _check_options(accuracy_warning, activation_bits, observer)
    check_positive_int("num_calibration_samples", num_calibration_samples)
    model = unwrap(model)
    check_initialized(model)
    with process_left_alone(), structure_left_alone(model):
        qmodel, info = _quantize_calibrated(
            model, calibration_data, options, symmetric, recipe, observer, activation_bits,
            num_calibration_samples, is_auto=method == "auto",
        )  # fmt: skip
    return _finish(qmodel, info, sqnr_warning_threshold, sqnr_error_threshold, accuracy_warning)


def _quantize_calibrated(
    model: nn.Module,
    data: Iterable[object],
    options: DecisionOptions,
    symmetric: bool,
    recipe: Recipe,
    observer: str,
    activation_bits: int | None,
    num_samples: int,
    *,
    is_auto: bool,
) -> tuple[GraphModule, QuantizationInfo]:
    drawn = list(calls(data, model, num_samples))
    gm = graph_of(model, drawn[0] if drawn else None)
    info = _plan(gm, options, symmetric, recipe)
    check_weights(gm, info.selected_layers)
    if info.selected_layers:
        batches, held_out = hold_out(drawn, lambda call: accepts(gm, call))
    else:  # the data only has to be accepted
        batches, held_out = drawn, []
    watch = "minmax" if observer == DYNAMIC else observer
    observed = insert_observers(gm, watch)
    used = calibrate(observed, batches)
    check_batches(drawn)
    info.observer, info.activation_bits = observer, activation_bits
    info.heldout_samples = sum(call.row_count for call in held_out)
    info.calibration_samples_used = used + info.heldout_samples
    group_size = options.group_size
    if recipe.scalings and info.selected_layers:
        scaled = scale_channels(
            gm,
            info.decisions,
            batches,
            recipe.scalings,
            SimulatedWeights(group_size, symmetric),
            None if activation_bits is None else SimulatedActivations(observer, group_size),
        )
        gm, info.decisions = scaled.gm, scaled.explain(info.decisions)
        info.folded_scales = scaled.folded
        if scaled.folded:
            observed = insert_observers(gm, watch)
            calibrate(observed, batches, progress=False)
    observers = observed_inputs(observed)
    statistics: dict[str, InputStatistics] = {}
    if info.selected_layers and (recipe.rounding != "gptq" or is_auto or activation_bits):
        statistics = observe_inputs(gm, info.selected_layers, batches)
    expected = expected_inputs(gm)
    steady = {name: seen.steadied(expected.get(name)) for name, seen in statistics.items()}

    def with_activations(qmodel: GraphModule) -> GraphModule:
        if activation_bits is not None and observer == DYNAMIC:
            _quantize_activations_dynamically(qmodel)
        elif activation_bits is not None:
            return quantize_activations(qmodel, observers, statistics)
        return qmodel

    planned = info.decisions
    qmodel = with_activations(_quantize_with_data(gm, info, recipe, batches, held_out, steady))
    _measure(gm, qmodel, info, batches, held_out, observers)
    if is_auto and held_out and info.selected_layers and info.sqnr_db is not None:
        plain = replace(info, decisions=planned)
        rounded = _round(gm, plain, Recipe((), "rtn"), steady)
        rounded = with_activations(rounded)
        _measure(gm, rounded, plain, batches, held_out, observers)
        if plain.sqnr_db is not None and plain.sqnr_db > info.sqnr_db:
            plain.method = f"rtn (gptq: {info.sqnr_db:.2f} dB on held-out data)"
            return rounded, plain
    return qmodel, info


def quantize(
    model: nn.Module,
    *,
    example_inputs: object = None,
    bits: int | Mapping[str, int] = 4,
    group_size: int = 128,
    symmetric: bool = True,
    method: str = "auto",
    activation_bits: int | None = None,
    layer_types: Sequence[Any] | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    skip_layer_types: Sequence[Any] | None = None,
    skip_layer_names: Sequence[str] | None = None,
    skip_param_threshold: int | None = None,
    accuracy_warning: str = "warn",
    sqnr_warning_threshold: float = 20.0,
    sqnr_error_threshold: float = 10.0,
) -> tuple[GraphModule, QuantizationInfo]:
    """Quantize a model's weights without calibration data.

    The options are those of `static_quantize`, with `method` one of `"rtn"`, `"hqq"`, `"best"` and
    `"auto"` (the last two are `"rtn"`), and with activations quantized dynamically if
    `activation_bits` is 8. With `example_inputs` (one call's arguments), models that `torch.fx`
    cannot trace symbolically are exported instead. Of layers that follow a norm, the norm's
    parameters tell roughly what their inputs are, which rounding makes use of.

    Returns:
        The quantized graph, and the record of what was done; its `sqnr_db` is None.
    """
    options = DecisionOptions(
        bits,
        group_size,
        layer_types,
        modules_to_not_convert,
        skip_layer_types,
        skip_layer_names,
        skip_param_threshold,
    )
    recipe = parse_method(method, has_data=False)
    _check_options(accuracy_warning, activation_bits, DYNAMIC)
    model = unwrap(model)
    check_initialized(model)
    with process_left_alone(), structure_left_alone(model):
        gm = graph_of(model, None if example_inputs is None else Call.of(example_inputs))
        info = _plan(gm, options, symmetric, recipe)
        check_weights(gm, info.selected_layers)
        info.observer, info.activation_bits = DYNAMIC, activation_bits
        qmodel = _round(gm, info, recipe, expected_inputs(gm))
        if activation_bits is not None:
            _quantize_activations_dynamically(qmodel)
        _measure(gm, qmodel, info, [], [], {})
    return _finish(qmodel, info, sqnr_warning_threshold, sqnr_error_threshold, accuracy_warning)


def plan(model: nn.Module, example_inputs: object = None, **rules: Any) -> QuantizationInfo:
    """A dry run: the ledger, without touching a weight.

    Args:
        model: any module, or a graph from `trace`.
        example_inputs: one call's arguments, for models that need `torch.export`.
        **rules: `bits`, `group_size` and the skip rules of `static_quantize`.

    Returns:
        A record whose `.table()` prints the decisions.
    """
    options = DecisionOptions(**rules)
    gm = graph_of(unwrap(model), None if example_inputs is None else Call.of(example_inputs))
    return _plan(gm, options, symmetric=True, recipe=parse_method("auto", has_data=False))


def _check_options(accuracy_warning: str, activation_bits: int | None, observer: str) -> None:
    check_choice("accuracy_warning", accuracy_warning, ("error", "warn", "ignore"))
    check_choice("observer", observer, (*OBSERVERS, DYNAMIC))
    if activation_bits not in (None, 8):
        raise OptionError(
            "activation_bits",
            found=repr(activation_bits),
            needed="8 or None",
            remedy="Leave it None for float activations.",
        )


def _plan(
    gm: GraphModule, options: DecisionOptions, symmetric: bool, recipe: Recipe
) -> QuantizationInfo:
    return QuantizationInfo(
        decide(gm, options),
        bits=options.bits,
        group_size=options.group_size,
        symmetric=symmetric,
        method=recipe.name,
        trace=trace_report(gm).to_dict(),
    )


def _quantize_with_data(
    gm: GraphModule,
    info: QuantizationInfo,
    recipe: Recipe,
    batches: list[Call],
    held_out: list[Call],
    statistics: Mapping[str, InputStatistics],
) -> GraphModule:
    """The rewritten graph; the record is told what the layers have to say."""
    if recipe.rounding != "gptq" or not info.selected_layers:
        return _round(gm, info, recipe, statistics)
    fitted = FittedLayers(info.group_size, info.symmetric, refined=recipe.refined)
    qmodel = quantize_sequentially(gm, info.decisions, batches, fitted.quantize, held_out)
    info.decisions = fitted.explain(info.decisions)
    return qmodel


def _round(
    gm: GraphModule,
    info: QuantizationInfo,
    recipe: Recipe,
    statistics: Mapping[str, InputStatistics],
) -> GraphModule:
    """The graph with each layer rounded on its own."""
    rounding = "rtn" if recipe.rounding == "gptq" else recipe.rounding
    layers = RoundedLayers(info.group_size, info.symmetric, rounding, statistics)
    qmodel = rewrite(gm, info.decisions, layers.quantize)
    info.decisions = layers.explain(info.decisions)
    return qmodel


def _quantize_activations_dynamically(qmodel: GraphModule) -> None:
    for module in qmodel.modules():
        if isinstance(module, QuantizedLinear):
            module.activation = "int8"


def _measure(
    gm: GraphModule,
    qmodel: GraphModule,
    info: QuantizationInfo,
    batches: list[Call],
    held_out: list[Call],
    observers: Mapping[str, Observer],
) -> None:
    """Measure on what was held out and, of the output, also on what chose the integers."""
    if not info.selected_layers:
        info.rows, info.sqnr_db = [], None
    else:
        info.rows, run = measure_rows(gm, qmodel, info.decisions, held_out or batches, observers)
        info.sqnr_db = run.output.db_or_none
        if held_out:
            info.fitted_sqnr_db = output_sqnr(gm, qmodel, batches).db_or_none
        else:
            info.fitted_sqnr_db = info.sqnr_db
    info.original_size_mb = model_bytes(gm) / MEGABYTE
    info.quantized_size_mb = model_bytes(qmodel) / MEGABYTE


def _finish(
    qmodel: GraphModule,
    info: QuantizationInfo,
    warning_threshold: float,
    error_threshold: float,
    accuracy_warning: str,
) -> tuple[GraphModule, QuantizationInfo]:
    """Check the accuracy and let the graph carry the record."""
    check_accuracy_warnings(info, warning_threshold, error_threshold, accuracy_warning)
    qmodel.meta[INFO_KEY] = info.to_dict()
    return qmodel, info
