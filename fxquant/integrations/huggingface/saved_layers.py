"""The layers of a folder that `save_pretrained` wrote: read by a library, rebuilt here.

The library loads each tensor of the folder under its name, wherever that is placed; every layer is
then rebuilt from its description with the checks of `load_model`.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import LoadError
from fxquant.integrations.huggingface.empty_layer import (
    INITIALIZED,
    EmptyLayer,
    become,
    empty,
    untie,
)
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.packed_parameter import hand_over, parameter_name
from fxquant.passes.rewrite import share_tables
from fxquant.serialization.model_layers import LayerRebuilder, empty_tensors
from fxquant.swap import may_become

WEIGHT = ".weight"
_REMEDY = "The folder is damaged or was made of another model: save the model again."


class SavedLayers:
    """Puts the layers of a checked description into a model that is being loaded.

    Args:
        description: what `describe_layers` gave.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description
        self._paths: dict[str, str] = {}  # of tensors
        self._places: dict[str, str] = {}
        self._floats: dict[str, nn.Module] = {}

    def prepare(
        self,
        model: nn.Module,
        place_of: Callable[[str], str | None],
        dtype_of: Callable[[str], torch.dtype],
    ) -> None:
        """Make room in `model`, which has no weights yet, for the tensors of the layers.

        Args:
            model: of the class that was saved, or of one with the same base model.
            place_of: where a layer of the saved model is in this one; None if it is not in it.
            dtype_of: that the library gives a parameter of this model, by its name.

        Raises:
            LoadError: the model lacks a layer that is in the description.
        """
        self._dtype_of = dtype_of
        for name in self.description["layers"]:
            place = place_of(name)
            if place is not None:
                unpacked = _unpacked(model, place)
                if unpacked is not None:
                    hand_over(model, unpacked)
                self._places[name] = place
                self._floats[name] = copy.copy(model.get_submodule(place))
        for place in self._places.values():
            layer = model.get_submodule(place)
            if not isinstance(layer, EmptyLayer):  # a layer may have two names
                empty(layer)
        for name, tensor in empty_tensors(self.description).items():
            owner = _owner(name, self.description["layers"])
            if owner in self._places:
                self._paths[name] = self._places[owner] + name[len(owner) :]
                emptied = model.get_submodule(self._places[owner])
                assert isinstance(emptied, EmptyLayer)
                emptied.hold(name[len(owner) + 1 :], tensor)
        untie(model, list(self._places.values()))

    @property
    def places(self) -> set[str]:
        """The layers, as they are called in the model."""
        return set(self._places.values())

    @property
    def loaded_names(self) -> set[str]:
        """The tensors of the layers, as they are called in the model."""
        return set(self._paths.values())

    def finish(self, model: nn.Module) -> None:
        """Make the layers of the tensors that were loaded.

        Raises:
            LoadError: a tensor is missing or damaged, or a layer does not fit the model.
        """
        rebuilder = LayerRebuilder(self.description, self._loaded(model))
        layers = {name: rebuilder.layer(name) for name in self._places}
        for name, layer in layers.items():
            if not may_become(self._floats[name], layer):
                raise LoadError(
                    name,
                    found=f"a quantized layer of {list(layer.weight_shape)} for a "
                    f"{type(self._floats[name]).__name__} of another shape or kind",
                    needed="a layer that computes what the model's own does",
                    remedy=_REMEDY,
                )
        for name, layer in layers.items():
            place = model.get_submodule(self._places[name])
            if not isinstance(place, QuantizedLayer):
                become(place, self._cast(name, layer))
        share_tables(model)

    def _loaded(self, model: nn.Module) -> dict[str, Tensor]:
        tensors = {name: model.get_buffer(path) for name, path in self._paths.items()}
        for name, tensor in tensors.items():
            if not getattr(tensor, INITIALIZED, False):
                raise LoadError(
                    name,
                    found="no such tensor in the folder",
                    needed="all tensors of the quantized layers",
                    remedy=_REMEDY,
                )
            if tensor.is_meta:
                raise LoadError(
                    name,
                    found="a tensor that the device map leaves on the disk",
                    needed="quantized layers in memory",
                    remedy="Leave offload_buffers out.",
                )
        return tensors

    def _cast(self, name: str, layer: QuantizedLayer) -> QuantizedLayer:
        """The layer for inputs of the dtype that the library gives a weight of that name."""
        dtype = self._dtype_of(self._places[name] + WEIGHT)
        return layer if layer.weight.dtype == dtype else layer.to(dtype)


def has_layer(model: nn.Module, path: str) -> bool:
    """Whether `model` has something with a weight at `path`, or what is packed there."""
    if _unpacked(model, path) is not None:
        return True
    try:
        return isinstance(getattr(model.get_submodule(path), "weight", None), Tensor)
    except AttributeError:
        return False


def _unpacked(model: nn.Module, path: str) -> str | None:
    """The name of the float parameter of `model` that becomes packed at `path`, or None."""
    name = parameter_name(path)
    try:
        return None if name is None or model.get_parameter(name) is None else name
    except AttributeError:
        return None


def missing_layer(model: nn.Module, name: str) -> LoadError:
    """The error for a layer of the description that `model` does not have."""
    return LoadError(
        "quantization_config",
        found=f"a quantized layer {name!r:.200}, which a {type(model).__name__} does not have",
        needed="layers of the model",
        remedy=_REMEDY,
    )


def _owner(tensor: str, layers: dict[str, Any]) -> str:
    """The layer below whose name a tensor lies.

    Raises:
        LoadError: there is none.
    """
    name = tensor
    while name not in layers:
        name = name.rpartition(".")[0]
        if not name:
            raise LoadError(
                "quantization_config",
                found=f"a tensor {tensor!r:.200} of no layer",
                needed="tensors of the quantized layers",
                remedy=_REMEDY,
            )
    return name
