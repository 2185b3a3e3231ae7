"""The step of transformers' loading that quantizes a weight."""

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps

from fxquant.integrations.huggingface.rounded_layers import RoundedOnLoading


class RoundOp(ConversionOps):
    """What transformers runs on a loaded weight that is to be quantized."""

    def __init__(self, layers: RoundedOnLoading) -> None:
        self.layers = layers

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, model: Any, missing_keys: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        """Quantize the weights among the loaded tensors; the others are given back."""
        kept: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if self.layers.wants(name):
                kept |= self.layers.round(model, name, tensor)
                if missing_keys is not None:
                    missing_keys.difference_update(self.layers.tied_to(name))
            else:
                kept[name] = tensor
        return kept
