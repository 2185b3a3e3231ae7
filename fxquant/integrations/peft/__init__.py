"""PEFT puts LoRA on quantized linear layers of any width once this package is imported.

| file | does |
|---|---|
| `lora_model.py` | `QuantizedLoraModel`: what PEFT makes of a `LoraConfig`, and what it refuses |
| `lora_linear.py` | `QuantizedLoraLinear`: an adapter on a quantized layer, merged and unmerged |
"""

from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType

from fxquant.integrations.peft.lora_linear import MergeLossWarning
from fxquant.integrations.peft.lora_model import QuantizedLoraModel

__all__ = ["MergeLossWarning"]

# PEFT's own list of layers is closed; its table of methods is not. Without quantized layers in a
# model, the class that is put there does what PEFT's does.
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = QuantizedLoraModel
