"""The model of a Hugging Face folder without its weights: what its layers are called.

Parameters are on the meta device. Buffers have their values: those that no folder holds (the
frequencies of rotary embeddings, say) are computed when the model is made.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fxquant.errors import OptionError
from fxquant.exporters.optional import optional_library


def meta_model(folder: str | os.PathLike[str], remedy: str) -> nn.Module:
    """The class that the folder's config names, in eval mode; its parameters are on meta.

    Args:
        folder: with a config.json that transformers understands.
        remedy: what the caller can do where it does not.

    Raises:
        OptionError: transformers is missing, or does not know the model.
    """
    transformers: Any = optional_library("transformers", "minilm", "to know the model's layers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        name = (getattr(config, "architectures", None) or ["AutoModel"])[0]
        kind = getattr(transformers, name, None)
        with _parameters_on_meta():
            made = transformers.AutoModel.from_config(config) if kind is None else kind(config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise OptionError(
            f"the folder {os.fspath(folder)!r}",
            found=f"that transformers cannot make its model: {type(error).__name__}: {error}",
            needed="a checkpoint whose config.json names a class of transformers",
            remedy=remedy,
        ) from error
    model: nn.Module = made.eval()
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that modules are given lose their values at once; memory for them is not kept."""

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # torch's annotation leaves out that a hook may return another parameter.
    handle = register_module_parameter_registration_hook(moved)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
