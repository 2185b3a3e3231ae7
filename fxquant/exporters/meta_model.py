"""The model of a Hugging Face folder without its weights: what its layers are called."""

import os
from typing import Any

import torch
from torch import nn

from fxquant.errors import OptionError
from fxquant.exporters.optional import optional_library


def meta_model(folder: str | os.PathLike[str]) -> nn.Module:
    """The class that the folder's config names, on the meta device and in eval mode.

    Args:
        folder: with a config.json that transformers understands.

    Raises:
        OptionError: transformers is missing, or does not know the model.
    """
    transformers: Any = optional_library("transformers", "minilm", "to know the model's layers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        name = (getattr(config, "architectures", None) or ["AutoModel"])[0]
        kind = getattr(transformers, name, None)
        with torch.device("meta"):
            made = transformers.AutoModel.from_config(config) if kind is None else kind(config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise OptionError(
            f"the folder {os.fspath(folder)!r}",
            found=f"that transformers cannot make its model: {type(error).__name__}: {error}",
            needed="a checkpoint whose config.json names a class of transformers",
            remedy="Load the model yourself, and call fxquant.quantize and fxquant.export.",
        ) from error
    model: nn.Module = made.eval()
    return model
