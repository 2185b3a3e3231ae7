"""The config of fxquant's layers in a folder of transformers."""

from transformers.utils.quantization_config import QuantizationConfigMixin

from fxquant.integrations.huggingface.folder_config import FolderConfig


class FxquantConfig(FolderConfig, QuantizationConfigMixin):
    """Quantize a float model while transformers' `from_pretrained` loads it, without data.

    Args:
        config: a `QuantConfig`, the name of a preset, the path of a recipe (.toml), or plain data.
        **options: the fields of `QuantConfig`; they change `config`.

    Attributes:
        options: the fields of the `QuantConfig`.
        layers: of a model that was saved: its quantized layers, as `describe_layers` gives them.

    Raises:
        OptionError: an option is not usable.

    >>> FxquantConfig("w4a16", group_size=32).options["group_size"]
    32
    """
