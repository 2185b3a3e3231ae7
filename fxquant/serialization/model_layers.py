"""Quantized layers in a model of the user's class: described, and built again, without a graph.

The description is plain data for another library's config; the tensors go into its own files, under
names that begin with that of their layer. Layers that share a weight share its tensors. As with
`load_model`, the data is not trusted.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import FxquantError, LoadError
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.linear import FLOAT_DTYPES
from fxquant.serialization.describe import Describer
from fxquant.serialization.rebuild import Rebuilder, damaged
from fxquant.serialization.tensor_store import TensorReader

_SPEC = re.compile(r"(\w+) ((?:\d{1,10}x){0,5}\d{1,10}|)", re.ASCII)
_DTYPES = {**FLOAT_DTYPES, "uint8": torch.uint8, "int8": torch.int8}


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """The quantized layers under all their names, without those inside another one."""
    outer = ""
    for name, module in model.named_modules(remove_duplicate=False):
        is_inside = outer and name.startswith(outer)
        if isinstance(module, QuantizedLayer) and not is_inside:
            outer = f"{name}."
            yield name, module


def describe_layers(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The quantized layers of `model` as plain data, and their tensors by name.

    Raises:
        SaveError: a layer has hooks or code of its own, which a file does not hold.
    """
    describer = Describer((), ())
    layers = {name: describer.module(layer, name) for name, layer in quantized_layers(model)}
    tensors = describer.writer.tensors
    specs = {name: _spec(tensor) for name, tensor in tensors.items()}
    return {"layers": layers, "modules": describer.modules, "tensors": specs}, tensors


def empty_tensors(description: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checked description on the meta device, by name.

    Raises:
        LoadError: one has a dtype or a shape that no layer's tensor has.
    """
    made = {}
    for name, spec in description["tensors"].items():
        found = _SPEC.fullmatch(spec)
        dtype = None if found is None else _DTYPES.get(found[1])
        if found is None or dtype is None:
            raise damaged(f"a tensor {name!r:.80} of the kind {spec!r:.80}")
        shape = [int(size) for size in found[2].split("x")] if found[2] else []
        made[name] = torch.empty(shape, dtype=dtype, device="meta")
    return made


def _spec(tensor: Tensor) -> str:
    """Dtype and shape in a word: config files have a line for each number of a list."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"


class LayerRebuilder:
    """Makes the layers of a checked description again.

    Args:
        description: what `describe_layers` gave.
        tensors: by the names in the description; those of layers that are not asked for may lack.
    """

    def __init__(self, description: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        self.numbers = description["layers"]
        self._rebuilder = Rebuilder(description["modules"], TensorReader(tensors), (), ())

    def layer(self, name: str) -> QuantizedLayer:
        """The layer called `name`; layers that share a weight share it again.

        Raises:
            LoadError: the description or a tensor is damaged, or a tensor is missing.
        """
        try:
            made = self._rebuilder.module(self.numbers[name])
        except LoadError:
            raise
        except (FxquantError, TypeError, ValueError, KeyError, AttributeError, IndexError,
                RuntimeError) as error:  # fmt: skip
            raise damaged(f"{name}: {type(error).__name__}: {error}") from error
        if not isinstance(made, QuantizedLayer):
            raise damaged(f"a {type(made).__name__} in the place of the quantized layer {name}")
        return made
