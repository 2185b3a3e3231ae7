"""What there is to export: quantized layers and float tensors by the user's names."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import OptionError, check_type
from fxquant.graph.layers import is_plain_linear, sites, user_name
from fxquant.modules.activation import quantize_activation, rounded_vectors
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.rounded_input import RoundedInput
from fxquant.serialization.files import load_model


@dataclass(frozen=True)
class Source:
    """A quantized model, taken apart.

    Attributes:
        model: the graph or the swapped model.
        layers: the quantized Linear layers.
        float_linears: names of the linear layers that stayed float.
        tensors: float parameters and buffers, those of quantized layers left out.
        other_layers: names of quantized layers of other kinds than Linear.
    """

    model: nn.Module
    layers: dict[str, QuantizedLinear]
    float_linears: list[str]
    tensors: dict[str, Tensor] = field(repr=False)
    other_layers: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most that stayed float."""
        elements: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            if tensor.is_floating_point():
                elements[tensor.dtype] += tensor.numel()
        for layer in self.layers.values():
            elements[layer.weight.dtype] += 1  # counts where nothing stayed float
        return elements.most_common(1)[0][0]

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point lies in the middle."""
        return all(getattr(layer, "symmetric", True) for layer in self.layers.values())

    @property
    def has_static_activations(self) -> bool:
        """Whether activations are quantized on ranges that calibration found."""
        if not isinstance(self.model, GraphModule):
            return any(isinstance(module, RoundedInput) for module in self.model.modules())
        return any(node.target is quantize_activation for node in self.model.graph.nodes)

    @property
    def has_dynamic_products(self) -> bool:
        """Whether the graph rounds factors of a product on ranges that it finds on the way."""
        if not isinstance(self.model, GraphModule):
            return False
        return any(node.target is rounded_vectors for node in self.model.graph.nodes)


def source_of(model: nn.Module | str | os.PathLike[str]) -> Source:
    """Take a quantized graph, a swapped model or a saved file apart.

    Raises:
        OptionError: there is no quantized layer in it.
        LoadError: the file cannot be loaded.
    """
    if isinstance(model, str | os.PathLike):
        model = load_model(model)
    check_type("model", model, nn.Module, "Pass a quantized model, or the path of a saved one.")
    modules = dict(_named_layers(model))
    others = [name for name, m in modules.items() if _is_no_linear(m)]
    layers = {name: m for name, m in modules.items() if isinstance(m, QuantizedLinear)}
    if not layers and not others:
        raise OptionError(
            "export",
            found=f"a {type(model).__name__} without a quantized layer",
            needed="a model that fxquant.quantize or fxquant.swap_modules returned, or a file that "
            "fxquant.save_model wrote",
            remedy="Quantize the model first.",
        )
    float_linears = [name for name, m in modules.items() if is_plain_linear(m)]
    inside = tuple(f"{name}." for name in (*layers, *others))
    tensors = {name: t for name, t in _named_tensors(model) if not name.startswith(inside)}
    return Source(model, layers, float_linears, tensors, others)


def _is_no_linear(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLayer) and not isinstance(
        module, QuantizedLinear | RoundedInput
    )


def _named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, GraphModule):
        yield from ((site.name, site.module) for site in sites(model))
    else:
        yield from model.named_modules(remove_duplicate=False)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for tensors in (model.named_parameters, model.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            if isinstance(model, GraphModule):
                name = user_name(model, name)
            yield name, tensor.detach()
