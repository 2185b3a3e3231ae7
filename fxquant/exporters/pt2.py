"""Files of torch.export, for any process with torch: `torch.export.load(path).module()(...)`.

The program keeps the packed weights. By default its products are the operator
`fxquant::linear_intn`, which `import fxquant` registers; with `standard=True` they are operators of
torch alone, so that a process without fxquant, or `torch._inductor.aoti_compile_and_package`, takes
the program.
"""

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxquant.errors import SaveError
from fxquant.exporters.findings import Finding
from fxquant.exporters.flat_module import FlatModule, example_call, not_exportable, open_sizes
from fxquant.exporters.source import Source
from fxquant.graph.calls import Call
from fxquant.kernels.reference import REFERENCE
from fxquant.modules.linear_intn import QuantizedLinearIntN
from fxquant.report.atomic import write_atomically

NAMES_FILE = "fxquant.json"  # in the file: the names of inputs and outputs, in order


class StandardLinear(nn.Module):
    """A quantized layer whose product is made of torch's own operators.

    Args:
        layer: the quantized layer; its packed integers, scales and zero points are kept.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLinearIntN) -> None:
        super().__init__()
        self.spec, self.activation = layer.spec, layer.activation
        saved = REFERENCE.pack(layer.quantized_weight, self.spec)
        for name, tensor in zip(("packed", "scales", "zero_points"), saved, strict=True):
            self.register_buffer(name, tensor.contiguous())
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], in the dtype of `x`."""
        saved = self.packed, self.scales, self.zero_points
        return REFERENCE.matmul(x, saved, self.spec, self.bias)

    def dequantize(self) -> Tensor:
        """The float32 weight [out, in], which a convolution of several places multiplies by."""
        saved = self.packed, self.scales, self.zero_points
        return REFERENCE.unpack(saved, self.spec).values()


@dataclass(frozen=True)
class Pt2:
    """Every quantized layer, and everything that torch.export takes.

    Attributes:
        example_inputs: the arguments of one call, as for `trace`; by default tensors of the shapes
            that a traced graph remembers.
        dynamic: whether batch, length and all other sizes that the model leaves open stay open.
        standard: use operators of torch alone. The products are then computed in float32 from
            weights that are unpacked at each call: slower, and no longer the same to the last bit.
    """

    example_inputs: Any = None
    dynamic: bool = True
    standard: bool = False

    def findings(self, source: Source) -> Iterator[Finding]:
        """Nothing is lost: the program holds what the layers hold."""
        yield from ()

    def write(self, source: Source, path: str | os.PathLike[str]) -> None:
        """Write, read back, put in place.

        Raises:
            OptionError: the example is missing.
            SaveError: torch cannot export the model, or the program that is read back holds other
                weights or gives other outputs, or the file cannot be written.
        """
        call = example_call(source.model, self.example_inputs)
        make = _standard if self.standard else _as_it_is
        flat = FlatModule.with_layers(source.model, call, make)
        program = _exported(flat, call, self.dynamic)
        names = {"inputs": flat.input_names, "outputs": flat.output_names}

        def save(new: str) -> None:
            with open(new, "wb") as file:
                torch.export.save(program, file, extra_files={NAMES_FILE: json.dumps(names)})
            with open(new, "rb") as file:
                _verify(torch.export.load(file), flat, call)

        write_atomically(path, save)


def _standard(module: nn.Module) -> nn.Module | None:
    return StandardLinear(module) if isinstance(module, QuantizedLinearIntN) else None


def _as_it_is(module: nn.Module) -> None:
    """Every layer stays."""


def _exported(flat: FlatModule, call: Call, dynamic: bool) -> ExportedProgram:
    sizes = open_sizes(call) if dynamic else None
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():  # it warns of its own code
            made = torch.export.export(flat, tuple(call.clone().tensors()), dynamic_shapes=sizes)
    except Exception as error:  # of many kinds
        raise not_exportable("pt2", error) from error
    # The user's data would be part of the file, and AOTInductor reads the shapes.
    made.example_inputs = tuple(torch.zeros_like(t) for t in call.tensors()), {}
    return made


def _verify(program: ExportedProgram, flat: FlatModule, call: Call) -> None:
    """Compare what was read back: each tensor of the model, and the outputs of the example."""
    found: dict[str, Any] = {**program.state_dict, **program.constants}
    for name, tensor in [*flat.named_parameters(), *flat.named_buffers()]:
        if name in found and not _same(found[name], tensor):
            raise _differs(name)
    run = program.module()
    with torch.no_grad():
        outputs = zip(run(*call.clone().tensors()), flat(*call.clone().tensors()), strict=True)
        for name, (one, other) in zip(flat.output_names, outputs, strict=True):
            if not _same(one, other):
                raise _differs(name)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether all values are equal; NaN is NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _differs(where: str) -> SaveError:
    return SaveError(
        where,
        found="other values in the exported program than in the model",
        needed="the same values",
        remedy="Nothing was put in place. Export the graph that fxquant.quantize returned: code "
        "that takes another path when it is exported cannot be kept.",
    )
