"""What diffusers calls while it loads a model with fxquant's layers, and saves it."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from fxquant.errors import LoadError
from fxquant.integrations.diffusers.config import FxquantDiffusersConfig
from fxquant.integrations.huggingface.empty_layer import INITIALIZED
from fxquant.integrations.huggingface.loading import layers_to_load
from fxquant.integrations.huggingface.rounded_layers import RoundedOnLoading
from fxquant.integrations.huggingface.saved_layers import SavedLayers, has_layer, missing_layer
from fxquant.pretrained import guard_saving


class FxquantDiffusersQuantizer(DiffusersQuantizer):
    """The quantizer of `quant_method="fxquant"`.

    Args:
        quantization_config: of the folder, or what the caller of `from_pretrained` gave.
        pre_quantized: whether it is that of the folder.

    Raises:
        LoadError: the folder's config describes no layers.
        OptionError: the caller's method needs data.
    """

    quantization_config: FxquantDiffusersConfig
    use_keep_in_fp32_modules = True  # what a class keeps in float32 stays so
    is_serializable = True  # folders can be saved
    is_trainable = True  # gradients pass through the layers, to adapters for example

    def __init__(self, quantization_config: FxquantDiffusersConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtype: torch.dtype | None = None
        self._layers: SavedLayers | RoundedOnLoading | None = layers_to_load(
            quantization_config, self.pre_quantized
        )
        self._state: dict[str, Tensor] = {}

    @classmethod
    def for_saving(
        cls, config: FxquantDiffusersConfig, state: dict[str, Tensor]
    ) -> "FxquantDiffusersQuantizer":
        """The quantizer of a model that is being saved, whose tensors are `state`."""
        made = cls.__new__(cls)
        DiffusersQuantizer.__init__(made, config, pre_quantized=True)
        made._layers, made._state = None, state
        return made

    @property
    def supports_parallel_loading(self) -> bool:
        """Weights are rounded one after the other."""
        return False

    def validate_environment(
        self, *args: Any, device_map: Mapping[str, Any] | str | None = None, **kwargs: Any
    ) -> None:
        """Refuse what quantized layers cannot be.

        Raises:
            LoadError: a part of the model is to stay on the disk.
        """
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise LoadError(
                "device_map",
                found="parts of the model that stay on the disk",
                needed="quantized layers in memory",
                remedy="Pass a device_map without 'disk'.",
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype that is asked for, which the layers report too."""
        self._dtype = torch_dtype
        return torch_dtype

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: list[str], **kwargs: Any
    ) -> None:
        if isinstance(self._layers, SavedLayers):
            dtype, kept = self._dtype or torch.get_default_dtype(), set(keep_in_fp32_modules)

            def place_of(name: str) -> str:
                if not has_layer(model, name):
                    raise missing_layer(model, name)
                return name

            def dtype_of(name: str) -> torch.dtype:
                return torch.float32 if kept & set(name.split(".")) else dtype

            self._layers.prepare(model, place_of, dtype_of)
        elif self._layers is not None:
            self._layers.prepare(model)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        """Whether a tensor of the folder is a part of a layer, or a weight that is to be one."""
        if isinstance(self._layers, SavedLayers):
            return param_name in self._layers.loaded_names
        return self._layers is not None and self._layers.wants(param_name)

    def check_quantized_param_shape(self, name: str, current: Tensor, loaded: Tensor) -> bool:
        """Raise a `LoadError` for a tensor of another shape than the folder's config says."""
        raise LoadError(
            name,
            found=f"a tensor of {list(loaded.shape)}",
            needed=f"{list(current.shape)}, as config.json describes it",
            remedy="The folder is damaged: save the model again.",
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: Mapping[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Keep a tensor of a layer as it is in the folder, or quantize a weight."""
        if isinstance(self._layers, RoundedOnLoading):
            self._layers.round(model, param_name, param_value.to(target_device))
            return
        owner, _, name = param_name.rpartition(".")
        tensor = state_dict[param_name].to(target_device)  # param_value is in the model's dtype
        setattr(tensor, INITIALIZED, True)
        model.get_submodule(owner)._buffers[name] = tensor

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Those that diffusers may leave out: tensors of layers are asked for at the end."""
        if isinstance(self._layers, SavedLayers):
            return [key for key in missing_keys if key not in self._layers.loaded_names]
        return missing_keys

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._layers is not None:
            self._layers.finish(model)
            self._layers = None
        guard_saving(model, self.quantization_config.options)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors to save, for which the config has the description."""
        return self._state, {}
