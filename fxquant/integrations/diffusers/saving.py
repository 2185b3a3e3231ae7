"""`save_pretrained` of models of diffusers with fxquant's layers."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from diffusers import ModelMixin
from torch import nn

from fxquant.integrations.diffusers.config import FxquantDiffusersConfig
from fxquant.integrations.diffusers.quantizer import FxquantDiffusersQuantizer
from fxquant.integrations.huggingface.saving import described_state

_QUANTIZER, _CONFIG = "hf_quantizer", "_internal_dict"


def savable_diffuser(
    part: nn.Module, options: Mapping[str, Any]
) -> AbstractContextManager[None] | None:
    """The context in which diffusers' own `save_pretrained` writes what loads again.

    Args:
        part: a model with quantized layers.
        options: the fields of the `QuantConfig` that they were made with.

    Returns:
        None: `part` is no model of diffusers.
    """
    return _described(part, options) if isinstance(part, ModelMixin) else None


@contextmanager
def _described(model: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Let the model have a quantizer and a described config while it is saved.

    Raises:
        SaveError: a layer cannot be described.
    """
    layers, state = described_state(model)
    config = FxquantDiffusersConfig.of_layers(options, layers)
    before = {name: vars(model)[name] for name in (_QUANTIZER, _CONFIG) if name in vars(model)}
    setattr(model, _QUANTIZER, FxquantDiffusersQuantizer.for_saving(config, state))
    model.register_to_config(quantization_config=config.to_dict())
    try:
        yield
    finally:
        vars(model).pop(_QUANTIZER)
        vars(model).update(before)
