"""What transformers calls while it loads a model with fxquant's layers, and saves it."""

from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer

from fxquant.errors import LoadError
from fxquant.integrations.transformers.config import FxquantConfig
from fxquant.integrations.transformers.rounded_layers import RoundedOnLoading, RoundOp
from fxquant.integrations.transformers.saved_layers import SavedLayers, refusing_weights
from fxquant.pretrained import guard_saving
from fxquant.serialization.model_layers import describe_layers, quantized_layers


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
        self._layers: SavedLayers | RoundedOnLoading | None = None
        if not self.pre_quantized:
            self._layers = RoundedOnLoading(quantization_config.config)
        elif quantization_config.layers is not None:
            self._layers = SavedLayers(quantization_config.layers)
        else:
            raise LoadError(
                "quantization_config",
                found="no description of layers",
                needed="what save_pretrained of a model with fxquant's layers writes",
                remedy="For a float folder, remove it from config.json and pass it to "
                "from_pretrained.",
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
            self._layers.prepare(model, dtype or model.dtype)
        elif self._layers is not None:
            self._layers.prepare(model)

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
        layers, tensors = describe_layers(model)
        model.config.quantization_config = FxquantConfig.of_layers(
            self.quantization_config.options, layers
        )
        inside = tuple(f"{name}." for name, _ in quantized_layers(model))
        floats = {k: v for k, v in model.state_dict().items() if not k.startswith(inside)}
        return {**floats, **tensors, **refusing_weights(layers["layers"])}, {}

    def is_serializable(self) -> bool:
        """Folders can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through the layers, to adapters for example."""
        return True
