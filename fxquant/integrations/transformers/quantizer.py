"""What transformers calls while it loads a model with fxquant's layers, and saves it."""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer

from fxquant.exporters.experts import experts_parameters
from fxquant.integrations.huggingface.loading import layers_to_load
from fxquant.integrations.huggingface.rounded_layers import RoundedOnLoading
from fxquant.integrations.huggingface.saved_layers import (
    WEIGHT,
    SavedLayers,
    has_layer,
    missing_layer,
)
from fxquant.integrations.huggingface.saving import described_state
from fxquant.integrations.transformers.config import FxquantConfig
from fxquant.integrations.transformers.round_op import RoundOp
from fxquant.modules.packed_parameter import parameter_name
from fxquant.pretrained import guard_saving


def refusing_weights(layers: Iterable[str]) -> dict[str, Tensor]:
    """What a folder has under the names of the float weights that the layers do not have.

    A process that does not know fxquant's layers would fill float ones with random weights, and
    only warn. It refuses a weight of another shape, though: that of a matrix is never [1].
    """
    modules = [name for name in layers if parameter_name(name) is None]  # others are converted
    return {name + WEIGHT: torch.zeros(1, dtype=torch.uint8) for name in modules}


class FxquantQuantizer(HfQuantizer):
    """The quantizer of `quant_method="fxquant"`.

    Args:
        quantization_config: of the folder, or what the caller of `from_pretrained` gave.
        pre_quantized: whether it is that of the folder.

    Raises:
        LoadError: the folder's config describes no layers.
        OptionError: the caller's method needs data.
    """

    quantization_config: FxquantConfig

    def __init__(self, quantization_config: FxquantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._layers: SavedLayers | RoundedOnLoading | None = layers_to_load(
            quantization_config, self.pre_quantized
        )

    @classmethod
    def for_saving(cls, config: FxquantConfig) -> "FxquantQuantizer":
        """The quantizer of a model that was not loaded by transformers."""
        made = cls.__new__(cls)
        HfQuantizer.__init__(made, config, pre_quantized=True)
        made._layers = None
        return made

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        if isinstance(self._layers, SavedLayers):
            place_of = functools.partial(_place, model)
            self._layers.prepare(model, place_of, _dtypes(model, dtype or model.dtype))
            for place in self._layers.places:
                model._keys_to_ignore_on_load_unexpected.add(f"^{re.escape(place + WEIGHT)}$")
        elif self._layers is not None:
            self._layers.prepare(model, experts_parameters(model))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a loaded parameter is the weight of a layer that is to be quantized."""
        return isinstance(self._layers, RoundedOnLoading) and self._layers.wants(param_name)

    def get_quantize_ops(self) -> RoundOp:
        """What is run on such a weight."""
        assert isinstance(self._layers, RoundedOnLoading)  # else no parameter needs it
        return RoundOp(self._layers)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> torch.dtype | None:
        """No other dtype than the saved one for what quantized layers consist of."""
        if isinstance(self._layers, SavedLayers):
            targets = set(converter.target_patterns)
            if targets & self._layers.loaded_names:
                return None
        new: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._layers is not None:
            self._layers.finish(model)
            self._layers = None
        guard_saving(model, self.quantization_config.options)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, Any]:
        """The tensors to save; the model's config then describes its layers as they are now.

        Raises:
            SaveError: a layer cannot be described.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # adapters alone are saved
        layers, state = described_state(model)
        model.config.quantization_config = FxquantConfig.of_layers(
            self.quantization_config.options, layers
        )
        return {**state, **refusing_weights(layers["layers"])}, {}

    def is_serializable(self) -> bool:
        """Folders can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through the layers, to adapters for example."""
        return True


def _dtypes(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """What transformers gives each parameter: `dtype`, but for those that a class excepts."""
    exceptions = model._get_dtype_plan(dtype)

    def dtype_of(name: str) -> torch.dtype:
        found = dtype
        for pattern, other in exceptions.items():
            if re.search(pattern.replace("*", ".*"), name):
                found = other
        return found

    return dtype_of


def _place(model: Any, name: str) -> str | None:
    """Where the layer of a saved model is in a model that may have a head more or less.

    None: `model` is of another class, and has no such layer outside the base model.

    Raises:
        LoadError: the model should have it.
    """
    prefix = f"{model.base_model_prefix}."
    for path in (name, name.removeprefix(prefix), prefix + name):
        if has_layer(model, path):
            return path
    is_same_class = type(model).__name__ in (model.config.architectures or ())
    if is_same_class or name.startswith(prefix):
        raise missing_layer(model, name)
    return None
