"""The config of fxquant's layers in a folder of diffusers."""

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from fxquant.config.quant_config import QuantConfig
from fxquant.integrations.huggingface.folder_config import METHOD, FolderConfig


class _Method(enum.StrEnum):
    """The quantization type, as diffusers asks for it: a word with a `.value`."""

    FXQUANT = METHOD


class FxquantDiffusersConfig(FolderConfig, QuantizationConfigMixin):
    """Quantize a float model while diffusers' `from_pretrained` loads it, without data.

    Args:
        config: a `QuantConfig`, the name of a preset, the path of a recipe (.toml), or plain data.
        **options: the fields of `QuantConfig`; they change `config`.

    Attributes:
        options: the fields of the `QuantConfig`.
        layers: of a model that was saved: its quantized layers, as `describe_layers` gives them.

    Raises:
        OptionError: an option is not usable.

    >>> FxquantDiffusersConfig(bits=8).options["bits"]
    8
    """

    def __init__(
        self, config: QuantConfig | Mapping[str, Any] | str | Path | None = None, **options: Any
    ) -> None:
        super().__init__(config, **options)
        self.quant_method = _Method.FXQUANT
