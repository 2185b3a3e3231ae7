"""transformers loads and saves models with fxquant's layers once this package is imported.

| file | does |
|---|---|
| `attention.py` | `"fxquant"` among the implementations of attention |
| `cache.py` | `RoomyCache`: keys and values with room for more tokens |
| `config.py` | `FxquantConfig`: what config.json says of the quantization |
| `quantizer.py` | `FxquantQuantizer`: what transformers calls while it loads and saves |
| `round_op.py` | the step of loading that quantizes a weight |
| `saving.py` | `save_pretrained` of swapped models, also inside sentence-transformers |

What it shares with the integration of diffusers is in `integrations/huggingface`.
"""

from transformers.quantizers.auto import register_quantization_config, register_quantizer

from fxquant.integrations.huggingface.folder_config import METHOD
from fxquant.integrations.transformers.attention import register_attention
from fxquant.integrations.transformers.cache import RoomyCache
from fxquant.integrations.transformers.config import FxquantConfig
from fxquant.integrations.transformers.quantizer import FxquantQuantizer
from fxquant.integrations.transformers.saving import savable_model
from fxquant.pretrained import savable

__all__ = ["FxquantConfig", "RoomyCache"]

register_attention()
register_quantization_config(METHOD)(FxquantConfig)
register_quantizer(METHOD)(FxquantQuantizer)
savable(savable_model)
