"""What users call: `quantize` and `static_quantize`. See `stages.py` for the stages."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Unpack, overload

import torch.distributed as dist
from torch import nn
from torch.fx import GraphModule

from fxquant.analysis.allocation import to_be_compared
from fxquant.analysis.sensitivity import measured_sensitivity
from fxquant.config.method import UNSCALED
from fxquant.config.option_checks import TypeRule, check_not_fused
from fxquant.config.quant_config import QuantConfig, QuantOptions, as_config
from fxquant.distributed.processes import Processes
from fxquant.errors import OptionError, check_choice
from fxquant.graph.calls import Call
from fxquant.graph.left_alone import process_left_alone, structure_left_alone
from fxquant.measure.quantization_info import INFO_KEY, QuantizationInfo, check_accuracy_warnings
from fxquant.passes.calibration_data import DEFAULT_ROWS, check_batches, drawn_calls
from fxquant.stages import run_stages
from fxquant.swap import swap_modules
from fxquant.tracing.offload import loaded
from fxquant.tracing.prepare import check_initialized
from fxquant.tracing.trace import graph_of

M = TypeVar("M", bound=nn.Module)
Config = QuantConfig | Mapping[str, Any] | str | Path | None


def static_quantize(
    model: nn.Module,
    calibration_data: Iterable[object],
    *,
    bits: int | Mapping[str, int] = 4,
    embeddings: int | None = None,
    group_size: int = 128,
    symmetric: bool = True,
    zero_points: str = "float",
    code_book: str | None = None,
    target: str | None = None,
    method: str = "auto",
    observer: str = "minmax",
    activation_bits: int | None = None,
    activation_products: bool = False,
    layer_types: Sequence[TypeRule] | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    skip_layer_types: Sequence[TypeRule] | None = None,
    skip_layer_names: Sequence[str] | None = None,
    skip_param_threshold: int | None = None,
    num_calibration_samples: int | None = DEFAULT_ROWS,
    token_noise: float = 0.0,
    fuse: bool = False,
    accuracy_warning: str = "warn",
    sqnr_warning_threshold: float = 20.0,
    sqnr_error_threshold: float = 10.0,
) -> tuple[GraphModule, QuantizationInfo]:
    """Quantize a model with calibration data: `quantize` with its options spelled out.

    Args:
        model: any module, or a graph from `trace`; it is not changed.
        calibration_data: an iterable of items: a tensor (one argument), a tuple or list
            (positional arguments) or a mapping (keyword arguments). The first item also serves as
            example inputs for tracing.
        bits: see `QuantConfig`, as for all that follow.
        embeddings: see there.
        group_size: see there.
        symmetric: see there.
        zero_points: see there.
        code_book: see there.
        target: see there.
        method: see there.
        observer: see there.
        activation_bits: see there.
        activation_products: see there.
        layer_types: see there.
        modules_to_not_convert: see there.
        skip_layer_types: see there.
        skip_layer_names: see there.
        skip_param_threshold: see there.
        num_calibration_samples: see there; 150 rows unless it is given, and None draws as much as
            `quantize` does.
        token_noise: see there.
        fuse: see there.
        accuracy_warning: see there.
        sqnr_warning_threshold: see there.
        sqnr_error_threshold: see there.

    Returns:
        The quantized graph, and the record of what was done.

    Raises:
        FxquantError: an option, the model or the data is not usable; nothing is half done.
    """
    config = QuantConfig(
        bits=bits,
        embeddings=embeddings,
        group_size=group_size,
        symmetric=symmetric,
        zero_points=zero_points,
        code_book=code_book,
        target=target,
        method=method,
        observer=observer,
        activation_bits=activation_bits,
        activation_products=activation_products,
        layer_types=layer_types,
        modules_to_not_convert=modules_to_not_convert,
        skip_layer_types=skip_layer_types,
        skip_layer_names=skip_layer_names,
        skip_param_threshold=skip_param_threshold,
        num_calibration_samples=num_calibration_samples,
        token_noise=token_noise,
        fuse=fuse,
        accuracy_warning=accuracy_warning,
        sqnr_warning_threshold=sqnr_warning_threshold,
        sqnr_error_threshold=sqnr_error_threshold,
    )
    processes = Processes.of()
    with processes.together():
        made = run_stages(model, _given(calibration_data), config, None, processes=processes)
        return _finish(*made)


@overload
def quantize(
    model: nn.Module,
    data: Iterable[object] | None = None,
    config: Config = None,
    *,
    example_inputs: object = None,
    into: Literal["graph"] = "graph",
    average_bits: float | None = None,
    memory: int | str | None = None,
    group: "dist.ProcessGroup | None" = None,
    **options: Unpack[QuantOptions],
) -> tuple[GraphModule, QuantizationInfo]: ...


@overload
def quantize(
    model: M,
    data: Iterable[object] | None = None,
    config: Config = None,
    *,
    example_inputs: object = None,
    into: Literal["model"],
    average_bits: float | None = None,
    memory: int | str | None = None,
    group: "dist.ProcessGroup | None" = None,
    **options: Unpack[QuantOptions],
) -> tuple[M, QuantizationInfo]: ...


def quantize(
    model: nn.Module,
    data: Iterable[object] | None = None,
    config: Config = None,
    *,
    example_inputs: object = None,
    into: Literal["graph", "model"] = "graph",
    average_bits: float | None = None,
    memory: int | str | None = None,
    group: "dist.ProcessGroup | None" = None,
    **options: Unpack[QuantOptions],
) -> tuple[nn.Module, QuantizationInfo]:
    """Quantize a model, with calibration data or without.

    Without data, `method` is one of `"rtn"`, `"hqq"`, `"best"` and `"auto"` (the last two are
    `"rtn"`), and activations are quantized dynamically if `activation_bits` is 8. Of layers that
    follow a norm, the norm's parameters tell roughly what their inputs are, which rounding makes
    use of.

    Args:
        model: any module, or a graph from `trace`; it is not changed.
        data: an iterable of items: a tensor (one argument), a tuple or list (positional arguments)
            or a mapping (keyword arguments).
        config: a `QuantConfig`, the name of a preset, the path of a recipe (.toml), or plain data.
        example_inputs: one call's arguments, to trace the model with; by default the first item of
            `data`. Without either, a model that `torch.fx` cannot trace symbolically stays opaque,
            and the graph is not compared with the model.
        into: `"graph"` gives the rewritten graph, `"model"` a copy of the model's own class with
            the same quantized layers (see `swap_modules`).
        average_bits: a budget: `sensitivity` measures what each layer costs, `allocate` spends the
            bits where they pay. The model is quantized so, and with one width for all layers, and
            what is better on rows that chose no integer is kept. Needs data.
        memory: that values between layers may take while layers are fitted to data, with those in
            work: `"4GB"`, or a number of bytes; by default half of what is free. What does not fit
            waits in a temporary file. The result is the same, bit for bit.
        group: of processes that share the work: each of them calls this with the same arguments,
            and all return the same. None: the default group where `torch.distributed` was
            initialised, else this process alone. The result is the same, bit for bit, however
            many they are.
        **options: the fields of `QuantConfig`; they change `config`.

    Returns:
        The quantized graph or model, and the record of what was done; without data, its `sqnr_db`
        is None.

    Raises:
        FxquantError: an option, the model or the data is not usable; nothing is half done.
        ProcessGroupError: another process of the group has failed.
    """
    processes = Processes.of(group)
    with processes.together():
        return _quantize(
            model, data, as_config(config, options), example_inputs, into, average_bits, memory,
            processes,
        )  # fmt: skip


def _quantize(
    model: nn.Module,
    data: Iterable[object] | None,
    made: QuantConfig,
    example_inputs: object,
    into: str,
    average_bits: float | None,
    memory: int | str | None,
    processes: Processes,
) -> tuple[nn.Module, QuantizationInfo]:
    """What `quantize` does, in each of the processes."""
    check_choice("into", into, ("graph", "model"))
    if into == "model" and isinstance(model, GraphModule):
        raise OptionError(
            "into",
            found="'model' for a graph, which does not know the class it was traced from",
            needed="the model itself",
            remedy="Pass the model, or call swap_modules(model, graph) afterwards.",
        )
    if into == "model":
        check_not_fused(made.fuse, "into='model', a copy of the model's own class")
    example = None if example_inputs is None else Call.of(example_inputs)
    drawn = None if data is None else _given(data)
    graph, configs = model, [made]
    if average_bits is not None:
        graph, drawn, configs = _allocated(model, drawn, made, example, average_bits, processes)
    results = [
        run_stages(graph, drawn, config, example, memory=memory, processes=processes)
        for config in configs
    ]
    qmodel, info = _finish(*max(results, key=_accuracy))
    return (swap_modules(model, qmodel) if into == "model" else qmodel), info


def _given(data: Iterable[object]) -> Iterable[object]:
    """The data; None here means that the caller forgot it."""
    if data is None:
        raise OptionError(
            "calibration_data",
            found="None",
            needed="an iterable of batches",
            remedy="Pass data, or call quantize(model) to do without.",
        )
    return data


def _allocated(
    model: nn.Module,
    data: Iterable[object] | None,
    config: QuantConfig,
    example: Call | None,
    average_bits: float,
    processes: Processes,
) -> tuple[GraphModule, list[Call], list[QuantConfig]]:
    """The traced graph, the drawn data, and the config with each allocation to compare."""
    if data is None or isinstance(config.bits, Mapping):
        raise OptionError(
            "average_bits",
            found="no data"
            if data is None
            else "a mapping of bits, which leaves nothing to allocate",
            needed="data to measure on, and one number of bits",
            remedy="Pass data, and leave bits out.",
        )
    model = loaded(model)
    check_initialized(model)
    with process_left_alone(), structure_left_alone(model):
        drawn = drawn_calls(data, model, config.num_calibration_samples)
        check_batches(drawn)
        gm = graph_of(model, example or drawn[0])
    options = QuantConfig(
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        zero_points=config.zero_points,
        code_book=config.code_book,
        target=config.target,
        embeddings=config.embeddings,
        modules_to_not_convert=config.modules_to_not_convert,
        skip_layer_names=config.skip_layer_names,
        skip_param_threshold=config.skip_param_threshold,
    )
    report = measured_sensitivity(
        gm,
        drawn,
        options,
        method="gradient",
        rounding=config.method if config.method in UNSCALED else "auto",
        num_samples=config.num_calibration_samples or DEFAULT_ROWS,
        processes=processes,
    )
    allocations = to_be_compared(report, average_bits)
    return gm, drawn, [config.changed(bits=bits) for bits in allocations]


def _accuracy(result: tuple[GraphModule, QuantizationInfo]) -> float:
    """The output's SQNR on rows that chose no integer; the least there is where it is not known."""
    found = result[1].sqnr_db
    return -math.inf if found is None or math.isnan(found) else found


def _finish(qmodel: GraphModule, info: QuantizationInfo) -> tuple[GraphModule, QuantizationInfo]:
    """Check the accuracy and let the graph carry the record."""
    config = info.config
    check_accuracy_warnings(
        info, config.sqnr_warning_threshold, config.sqnr_error_threshold, config.accuracy_warning
    )
    qmodel.meta[INFO_KEY] = info.to_dict()
    return qmodel, info
