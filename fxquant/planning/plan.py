"""`plan`: what a run would do with each layer, and what it would take, before it begins."""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Self, Unpack

from torch import nn

from fxquant.config.memory import memory_bytes
from fxquant.config.method import parse_method
from fxquant.config.quant_config import QuantConfig, QuantOptions, as_config
from fxquant.exporters.folder_reader import FolderReader
from fxquant.exporters.stream import decided, for_blocks, for_folder
from fxquant.graph.calls import Call
from fxquant.graph.left_alone import process_left_alone, structure_left_alone
from fxquant.measure.quantization_info import QuantizationInfo
from fxquant.measure.sizes import MEGABYTE, model_bytes
from fxquant.passes.calibration_data import check_batches, drawn_calls
from fxquant.passes.decide import decide
from fxquant.planning.folder import forecast_folder, take_dtypes
from fxquant.planning.forecast import Forecast, format_bytes, format_seconds
from fxquant.planning.graph import forecast_graph
from fxquant.tracing.offload import loaded
from fxquant.tracing.trace import graph_of
from fxquant.tracing.trace_report import trace_report


@dataclass(repr=False)
class Plan(QuantizationInfo):
    """What `quantize` or `quantize_checkpoint` would do: the record of a run that was not made.

    Attributes:
        forecast: the memory, disk and time that it would take.
    """

    forecast: Forecast | None = None

    def headline(self) -> str:
        """Layers, size, memory and time in one line."""
        text = (
            f"{len(self.selected_layers)} of {len(self.decisions)} layers would be quantized by "
            f"{self.method}, {self.original_size_mb:.2f} -> {self.quantized_size_mb:.2f} MB"
        )
        if self.forecast is None:
            return text
        memory, seconds = self.forecast.memory_bytes, self.forecast.seconds
        return f"{text}, about {format_bytes(memory)} and {format_seconds(seconds)}"

    def lines(self) -> list[str]:
        """The forecast in a few lines."""
        return [] if self.forecast is None else self.forecast.lines()

    def summary(self) -> str:
        """What a page begins with: the headline and the forecast."""
        return ". ".join([self.headline(), *(" ".join(line.split()) for line in self.lines())])

    def __str__(self) -> str:
        return "\n".join([super().__str__(), "", *self.lines()])

    def _repr_html_(self) -> str:
        return f"{super()._repr_html_()}<pre>{escape(chr(10).join(self.lines()))}</pre>"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Undo `to_dict`, also after JSON."""
        values = dict(data)
        forecast = values.pop("forecast", None)
        made = super().from_dict(values)
        made.forecast = None if forecast is None else Forecast.from_dict(forecast)
        return made


def plan(
    model: nn.Module | str | os.PathLike[str],
    data: Iterable[object] | None = None,
    config: QuantConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    example_inputs: object = None,
    memory: int | str | None = None,
    **options: Unpack[QuantOptions],
) -> Plan:
    """A dry run: the decisions and what a run would take, without touching a weight.

    Memory and disk follow from the shapes of layers, and of the values between them: the model's
    code runs on the data's shapes without values (`planning/rehearsal.py`). Seconds are what the
    model took to be traced, and for the rest the products, roundings and fits of the run, by how
    fast this machine is at a few small ones, on which about a second is spent. It is assumed that

    - nothing else runs on the machine, and the disk keeps up with reading and writing;
    - products make up the time in which the model runs: attention in one kernel, norms and the
      like are not counted;
    - a layer wider than 1024 takes as much longer to fit as inputs² · (inputs + rows) is larger;
    - the allocator keeps a fifth of the peak besides, of memory that was freed;
    - all blocks of a folder's model are like the largest.

    Args:
        model: any module, a graph from `trace`, or the path of a folder, for which the plan is that
            of `quantize_checkpoint`: no weight is read.
        data: what the run would be given; of a generator the items are used up. Without it, the
            forecast is that of a run without data, and says what is missing.
        config: as in `quantize`.
        example_inputs: one call's arguments, for models that need `torch.export`; by default the
            first item of `data`.
        memory: what the run would be given.
        **options: the fields of `QuantConfig`.

    Returns:
        A record whose `.table()` prints the decisions, and whose `.forecast` has bytes and seconds.

    Raises:
        FxquantError: an option, the model or the data is not usable.
    """
    made = as_config(config, options)
    if isinstance(model, str | os.PathLike):
        return _plan_folder(model, made, data, memory)
    return _plan_model(model, example_inputs, made, data, memory)


def _plan_model(
    model: nn.Module,
    example_inputs: object,
    config: QuantConfig,
    data: Iterable[object] | None,
    memory: int | str | None,
) -> Plan:
    """The plan of `quantize`."""
    recipe, most_bytes = parse_method(config.method, has_data=True), memory_bytes(memory)
    model = loaded(model)
    with process_left_alone(), structure_left_alone(model):
        drawn = None
        if data is not None:
            drawn = drawn_calls(data, model, config.num_calibration_samples)
            check_batches(drawn)
        example = None if example_inputs is None else Call.of(example_inputs)
        if example is None and drawn:
            example = drawn[0]
        began = time.thread_time()
        gm = graph_of(model, example)
        seconds = time.thread_time() - began
        decisions = decide(gm, config)
        forecast = forecast_graph(
            gm, decisions, config, recipe, example, drawn, most_bytes, seconds
        )
    return Plan(
        decisions,
        config=config,
        method=recipe.name,
        original_size_mb=model_bytes(gm) / MEGABYTE,
        quantized_size_mb=forecast.output_bytes / MEGABYTE,
        trace=trace_report(gm).to_dict(),
        forecast=forecast,
    )


def _plan_folder(
    source: str | os.PathLike[str],
    config: QuantConfig,
    data: Iterable[object] | None,
    memory: int | str | None,
) -> Plan:
    """The plan of `quantize_checkpoint`."""
    config = for_folder(config)
    recipe, most_bytes = (
        parse_method(config.method, has_data=data is not None),
        memory_bytes(memory),
    )
    base = FolderReader(source)
    with process_left_alone():
        decisions, weights = decided(base, config)
        drawn, fitting = None, config
        if data is not None:
            fitting = for_blocks(config, recipe)
            drawn = drawn_calls(data, weights.model, config.num_calibration_samples)
            check_batches(drawn)
        take_dtypes(weights)
        forecast = forecast_folder(weights.model, decisions, fitting, recipe, drawn, most_bytes)
    return Plan(
        decisions,
        config=config,
        method=recipe.name,
        original_size_mb=sum(base.nbytes(name) for name in base.files) / MEGABYTE,
        quantized_size_mb=forecast.output_bytes / MEGABYTE,
        forecast=forecast,
    )
