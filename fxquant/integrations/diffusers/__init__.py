"""diffusers loads and saves models with fxquant's layers once this package is imported.

| file | does |
|---|---|
| `config.py` | `FxquantDiffusersConfig`: what config.json says of the quantization |
| `quantizer.py` | `FxquantDiffusersQuantizer`: what diffusers calls while it loads and saves |
| `saving.py` | `save_pretrained` of swapped models, also as parts of pipelines |

What it shares with the integration of transformers is in `integrations/huggingface`. A folder is
refused by diffusers itself where this package was not imported: its quantization type is unknown.
"""

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from fxquant.integrations.diffusers.config import FxquantDiffusersConfig
from fxquant.integrations.diffusers.quantizer import FxquantDiffusersQuantizer
from fxquant.integrations.diffusers.saving import savable_diffuser
from fxquant.integrations.huggingface.folder_config import METHOD
from fxquant.pretrained import savable

__all__ = ["FxquantDiffusersConfig"]

AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = FxquantDiffusersConfig
AUTO_QUANTIZER_MAPPING[METHOD] = FxquantDiffusersQuantizer
savable(savable_diffuser)
