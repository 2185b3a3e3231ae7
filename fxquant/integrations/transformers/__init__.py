"""transformers loads and saves models with fxquant's layers once this package is imported.

| file | does |
|---|---|
| `config.py` | `FxquantConfig`: what config.json says of the quantization |
| `quantizer.py` | `FxquantQuantizer`: what transformers calls while it loads and saves |
| `empty_layer.py` | the place of a quantized layer while its tensors are loaded |
| `saved_layers.py` | the layers of a folder that `save_pretrained` wrote |
| `rounded_layers.py` | layers quantized while a float folder is loaded |
| `saving.py` | `save_pretrained` of swapped models, also inside sentence-transformers |
"""

from transformers.quantizers.auto import register_quantization_config, register_quantizer

from fxquant.integrations.transformers.config import METHOD, FxquantConfig
from fxquant.integrations.transformers.quantizer import FxquantQuantizer
from fxquant.integrations.transformers.saving import savable_model
from fxquant.pretrained import savable

__all__ = ["FxquantConfig"]

register_quantization_config(METHOD)(FxquantConfig)
register_quantizer(METHOD)(FxquantQuantizer)
savable(savable_model)
