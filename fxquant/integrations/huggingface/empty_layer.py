"""The place of a quantized layer while a library loads tensors into it."""

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.graph.layers import replace_layer
from fxquant.modules.layer import QuantizedLayer

INITIALIZED = "_is_hf_initialized"  # the mark on a tensor that was loaded, as transformers sets it
_FOR_INITIALIZERS = ("weight", "bias")


class EmptyLayer(nn.Module):
    """Holds the tensors of a layer until all are there; then it becomes the layer.

    Initializers of a model's class may ask it for a weight: it has one without memory, marked as
    initialized. Dispatchers may put their forward around that of this object: what they kept calls
    what the object has become.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        empty = torch.empty_like(weight, device="meta")
        setattr(empty, INITIALIZED, True)
        vars(self).update(weight=empty, bias=None)

    def hold(self, path: str, tensor: Tensor) -> None:
        """Make room for a tensor at a path below this layer."""
        owner: nn.Module = self
        *parts, name = path.split(".")
        for part in parts:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        vars(owner).pop(name, None)
        owner.register_buffer(name, tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call what this object has become."""
        if type(self) is EmptyLayer:
            raise NotImplementedError("a quantized layer whose tensors are being loaded")
        return type(self).forward(self, *args, **kwargs)


def empty(layer: nn.Module) -> EmptyLayer:
    """Let a layer of the float model become empty; it stays the same object."""
    weight = layer.weight
    assert isinstance(weight, Tensor)  # chosen layers have one
    replace_layer(layer, EmptyLayer(weight))
    assert isinstance(layer, EmptyLayer)
    return layer


def become(place: nn.Module, layer: QuantizedLayer) -> None:
    """Let an empty layer become a quantized one."""
    for name in _FOR_INITIALIZERS:
        vars(place).pop(name, None)
    mode = place.training
    replace_layer(place, layer)
    place.training = mode


def tied_weights(model: nn.Module) -> dict[str, str]:
    """The parameters that the library will tie, each with the one that it becomes.

    Models of diffusers tie none when they are loaded.
    """
    found: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return found


def untie(model: nn.Module, paths: list[str]) -> None:
    """Let the library not tie parameters of layers that have none any more."""
    layers, tied = set(paths), tied_weights(model)
    for target, source in list(tied.items()):
        if {name.rpartition(".")[0] for name in (target, source)} & layers:
            del tied[target]
