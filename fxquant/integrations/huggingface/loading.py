"""What is loaded: the layers of a folder, or float weights that are rounded."""

from fxquant.errors import LoadError
from fxquant.integrations.huggingface.folder_config import FolderConfig
from fxquant.integrations.huggingface.rounded_layers import RoundedOnLoading
from fxquant.integrations.huggingface.saved_layers import SavedLayers


def layers_to_load(config: FolderConfig, pre_quantized: bool) -> SavedLayers | RoundedOnLoading:
    """How the layers of a model come about that a library loads.

    Args:
        config: of the folder, or what the caller of `from_pretrained` gave.
        pre_quantized: whether it is that of the folder.

    Raises:
        LoadError: the folder's config describes no layers.
        OptionError: the caller's method needs data.
    """
    if not pre_quantized:
        return RoundedOnLoading(config.config)
    if config.layers is not None:
        return SavedLayers(config.layers)
    raise LoadError(
        "quantization_config",
        found="no description of layers",
        needed="what save_pretrained of a model with fxquant's layers writes",
        remedy="For a float folder, remove it from config.json and pass it to from_pretrained.",
    )
