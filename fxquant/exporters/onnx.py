"""ONNX files for ONNX Runtime (`MatMulNBits`), or with operators of the standard only.

torch's own exporter writes the graph. In place of each layer it finds a module that is one
operator, so that nothing is computed or rounded on the way.
"""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule

from fxquant.config.targets import TARGETS, Target
from fxquant.errors import OptionError, SaveError
from fxquant.exporters.findings import Finding
from fxquant.exporters.flat_module import FlatModule, example_call, not_exportable, open_sizes
from fxquant.exporters.integer_layer import integer_layer
from fxquant.exporters.onnx_layers import OPSET, OnnxInt4, OnnxInt8, with_onnx_activations
from fxquant.exporters.onnx_reader import OnnxReader
from fxquant.exporters.onnx_standard import use_standard_operators
from fxquant.exporters.optional import optional_library
from fxquant.exporters.requirements import (
    exact_scales,
    float_inside_layers,
    holdable,
    linear_layers_only,
    whole_zero_points,
    within,
)
from fxquant.exporters.source import Source
from fxquant.exporters.verify import verify_weights
from fxquant.graph.calls import Call
from fxquant.report.atomic import write_atomically, write_folder_atomically

ONNX_SUFFIX = ".onnx"
FILE, DATA = "model.onnx", "model.onnx.data"
LARGEST_FILE = 2 * 10**9  # bytes: protobuf's limit is 2 GiB
ACCURACY_LEVELS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Onnx:
    """INT4 and INT8 layers, and static INT8 activations.

    Attributes:
        example_inputs: the arguments of one call, as for `trace`; by default tensors of the shapes
            that a traced graph remembers.
        dynamic: whether batch, length and all other sizes that the model leaves open stay open.
        accuracy_level: of `MatMulNBits`: 0 computes in the model's dtype; 4 lets ONNX Runtime round
            activations to 8 bits, which is faster and less accurate.
        standard: use `DequantizeLinear` and `MatMul` instead, for runtimes without `MatMulNBits`.
    """

    example_inputs: Any = None
    dynamic: bool = True
    accuracy_level: int = 0
    standard: bool = False

    target: ClassVar[Target] = TARGETS["onnx"]

    def __post_init__(self) -> None:
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise OptionError(
                "accuracy_level",
                found=repr(self.accuracy_level),
                needed="0, 1, 2, 3 or 4, as ONNX Runtime describes them",
                remedy="Leave it out for the most accurate product.",
            )
        if self.standard and self.accuracy_level:
            raise OptionError(
                "accuracy_level",
                found=f"{self.accuracy_level} with standard=True",
                needed="0: the operators of the standard have no such option",
                remedy="Leave one of the two out.",
            )

    def findings(self, source: Source) -> Iterator[Finding]:
        """What would be lost, and which runtimes cannot run it well."""
        yield from linear_layers_only(source, self.target)
        yield from float_inside_layers(source)
        for name, module in source.layers.items():
            layer = integer_layer(module)
            yield from holdable(name, layer, self.target)
            if layer is None or layer.code_book is not None:
                continue
            yield from exact_scales(name, layer, source.dtype, self.target)
            if self.standard or layer.bits == 8:
                yield from whole_zero_points(name, layer, self.target)
                if layer.shape[1] % min(layer.group_size, layer.shape[1]):
                    problem = f"groups of {layer.group_size} leave a short last one"
                    yield Finding(name, problem, within(self.target))
            elif bool((layer.zero_points != layer.zero_points.round()).any()):
                problem = "its zero points are fractions, which ONNX Runtime runs 50 times slower"
                yield Finding(name, problem, within(self.target), is_loss=False)
        if source.dtype is torch.bfloat16:
            problem = "it computes in bfloat16, which ONNX Runtime does not on CPUs"
            remedy = "Quantize the model in float32 or float16."
            yield Finding("model", problem, remedy, is_loss=False)

    def write(self, source: Source, path: str | os.PathLike[str]) -> None:
        """Write, read back, put in place.

        A path that ends in .onnx becomes one file; any other one a folder, with the weights in a
        file of their own, for models of any size.

        Raises:
            OptionError: a library or the example is missing.
            SaveError: torch cannot export the model, a weight reads back differently, or the file
                cannot be written.
        """
        onnx = optional_library("onnx", "onnx", "to write and read ONNX files")
        optional_library("onnxscript", "onnx", "since torch's exporter needs it")
        call = example_call(source.model, self.example_inputs)
        is_file = os.fspath(path).endswith(ONNX_SUFFIX)
        if is_file:
            _check_size(source, path)
        program = _exported(self._with_operators(source, call), call, self.dynamic)
        model = program.model_proto
        if self.standard:
            use_standard_operators(onnx, model)
        if is_file:
            write_atomically(path, lambda new: _save(onnx, model, source, Path(new)))
        else:
            write_folder_atomically(
                path, lambda new: _save(onnx, model, source, Path(new) / FILE, DATA)
            )

    def _with_operators(self, source: Source, call: Call) -> FlatModule:
        """A copy of the model, with operators in the place of quantized layers."""
        names = {id(layer): name for name, layer in source.layers.items()}

        def operator(module: nn.Module) -> nn.Module | None:
            return self._operator(names[id(module)], source) if id(module) in names else None

        flat = FlatModule.with_layers(source.model, call, operator)
        if isinstance(flat.model, GraphModule):
            with_onnx_activations(flat.model)
        return flat

    def _operator(self, name: str, source: Source) -> nn.Module:
        layer = integer_layer(source.layers[name])
        assert layer is not None  # a finding otherwise
        if layer.bits == 8:
            return OnnxInt8(name, layer, source.dtype)
        return OnnxInt4(name, layer, source.dtype, self.accuracy_level)


def _exported(flat: FlatModule, call: Call, dynamic: bool) -> Any:
    """What torch's exporter makes of the model.

    Raises:
        SaveError: it raised; the text has the first reason.
    """
    tensors = tuple(tensor.detach() for tensor in call.clone().tensors())
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():  # it warns of its own code
            return torch.onnx.export(
                flat,
                tensors,
                dynamo=True,
                opset_version=OPSET,
                input_names=flat.input_names,
                output_names=flat.output_names,
                dynamic_shapes=open_sizes(call) if dynamic else None,
                verbose=False,
            )
    except Exception as error:  # of many kinds
        raise not_exportable("onnx", error) from error


def _save(onnx: Any, model: Any, source: Source, path: Path, data: str | None = None) -> None:
    """Write the file, and read the weights back."""
    options = {} if data is None else {"save_as_external_data": True, "location": data}
    onnx.save(model, path, **options)
    onnx.checker.check_model(path)
    reader = OnnxReader(onnx, path)
    # A layer that runs nowhere, or a second name of one, has no operator of its own.
    named = [(name, layer) for name, layer in source.layers.items() if name in reader.names]
    missing = {id(layer) for layer in source.layers.values()} - {id(layer) for _, layer in named}
    if missing:
        raise SaveError(
            "export to onnx",
            found=f"{len(missing)} layers without an operator in the file",
            needed="every quantized layer in the graph that was exported",
            remedy="Pass example_inputs with which every layer runs.",
        )
    verify_weights(named, reader.weight)


def _check_size(source: Source, path: str | os.PathLike[str]) -> None:
    weights = sum(layer.quantized_weight.nbytes for layer in source.layers.values())
    size = weights + sum(tensor.nbytes for tensor in source.tensors.values())
    if size > LARGEST_FILE:
        raise SaveError(
            os.fspath(path),
            found=f"a model of {size / 10**9:.1f} GB",
            needed="at most 2 GB in one ONNX file",
            remedy="Pass a path that does not end in .onnx: a folder with the weights apart.",
        )
