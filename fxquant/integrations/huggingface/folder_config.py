"""What the config.json of a folder says of fxquant's layers."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from fxquant.config.option_checks import check_not_fused
from fxquant.config.quant_config import QuantConfig, as_config
from fxquant.errors import LoadError
from fxquant.serialization.schema import check_layers

METHOD = "fxquant"
CONFIG_VERSION = 1  # of the description in config.json
_KEYS = {"quant_method", "format", "options", "layers"}


class FolderConfig:
    """The options of the quantization, and the layers once there are any.

    Args:
        config: a `QuantConfig`, the name of a preset, the path of a recipe (.toml), or plain data.
        **options: the fields of `QuantConfig`; they change `config`.

    Attributes:
        options: the fields of the `QuantConfig`.
        layers: of a model that was saved: its quantized layers, as `describe_layers` gives them.

    Raises:
        OptionError: an option is not usable.
    """

    def __init__(
        self, config: QuantConfig | Mapping[str, Any] | str | Path | None = None, **options: Any
    ) -> None:
        self.quant_method: str = METHOD
        made = as_config(config, options)
        check_not_fused(made.fuse, "a model of the library's own class")
        self.options = made.to_dict()
        self.layers: dict[str, Any] | None = None

    def __repr__(self) -> str:
        layers = "" if self.layers is None else f", {len(self.layers['layers'])} layers"
        return f"{type(self).__name__}({self.options}{layers})"

    @property
    def config(self) -> QuantConfig:
        """The options as a value."""
        return QuantConfig.from_dict(self.options)

    @classmethod
    def of_layers(cls, options: Mapping[str, Any], layers: dict[str, Any]) -> Self:
        """The config of a model that has quantized layers."""
        made = cls(options)
        made.layers = layers
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        data: dict[str, Any] = {
            "quant_method": METHOD,
            "format": CONFIG_VERSION,
            "options": self.options,
        }
        if self.layers is not None:
            data["layers"] = self.layers
        return copy.deepcopy(data)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read what config.json says; the library calls this, and `**kwargs` are its own.

        Raises:
            LoadError: it is of another version, or damaged.
            OptionError: an option in it is not usable.
        """
        version = config_dict.get("format", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise LoadError(
                "quantization_config",
                found=f"format {version!r:.40} of fxquant's layers",
                needed=f"format {CONFIG_VERSION}",
                remedy="Load the folder with the version of fxquant that wrote it.",
            )
        unknown = sorted(set(config_dict) - _KEYS)
        if unknown or not isinstance(config_dict.get("options", {}), dict):
            raise LoadError(
                "quantization_config",
                found=f"entries {unknown!r:.80}" if unknown else "options that are no mapping",
                needed=f"entries {sorted(_KEYS)}",
                remedy="Write QuantConfig's fields below 'options'.",
            )
        made = cls(config_dict.get("options"))
        if config_dict.get("layers") is not None:
            check_layers(config_dict["layers"])
            made.layers = config_dict["layers"]
        return (made, kwargs) if return_unused_kwargs else made
