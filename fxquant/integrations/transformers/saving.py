"""`save_pretrained` of models with fxquant's layers, also inside sentence-transformers."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fxquant.errors import SaveError
from fxquant.integrations.transformers.config import FxquantConfig
from fxquant.integrations.transformers.quantizer import FxquantQuantizer
from fxquant.serialization.model_layers import quantized_layers

_QUANTIZER, _CONFIG = "hf_quantizer", "quantization_config"


def savable_model(
    part: nn.Module, options: Mapping[str, Any]
) -> AbstractContextManager[None] | None:
    """The context in which the library's own `save_pretrained` writes what loads again.

    Args:
        part: a model with quantized layers.
        options: the fields of the `QuantConfig` that they were made with.

    Returns:
        None: `part` is no model of transformers or sentence-transformers.

    Raises:
        SaveError: a quantized layer lies where transformers does not load it.
    """
    if isinstance(part, PreTrainedModel):
        return _described(part, options)
    if _is_sentence_transformer(part):
        _check_inside(part)
        return nullcontext()  # the model of transformers inside has a context of its own
    return None


@contextmanager
def _described(model: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Let the model have a quantizer and a described config while it is saved."""
    before = vars(model).get(_QUANTIZER), vars(model.config).get(_CONFIG)
    setattr(model, _QUANTIZER, FxquantQuantizer.for_saving(FxquantConfig(options)))
    try:
        yield
    finally:
        for owner, name, value in zip(
            (model, model.config), (_QUANTIZER, _CONFIG), before, strict=True
        ):
            if value is None:
                vars(owner).pop(name, None)
            else:
                setattr(owner, name, value)


def _is_sentence_transformer(part: nn.Module) -> bool:
    library = sys.modules.get("sentence_transformers.base.model")
    return library is not None and isinstance(part, library.BaseModel)


def _check_inside(model: nn.Module) -> None:
    """Refuse quantized layers that lie in no model of transformers."""
    inside = {
        layer
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        for layer in part.modules()
    }
    for name, layer in quantized_layers(model):
        if layer not in inside:
            raise SaveError(
                f"{type(model).__name__}.save_pretrained",
                found=f"the quantized layer {name}, which lies in no model of transformers: "
                "sentence-transformers would not load it",
                needed="quantized layers in models of transformers alone",
                remedy=f"Quantize again with modules_to_not_convert=[{name!r}].",
            )
