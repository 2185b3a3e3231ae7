"""`save_pretrained` of a model with quantized layers writes a folder that loads again, or nothing.

A library's own `save_pretrained` would write the packed tensors, and its `from_pretrained` would
then fill float layers with random weights. So the method is guarded in each part of a model that
has quantized layers. An integration that is imported says with `savable` how its library can save
them: it opens a context in which the library's own method is right.
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

from torch import nn

from fxquant.errors import SaveError
from fxquant.modules.layer import has_quantized_layer

GUARDED = ("save_pretrained", "save")  # of a part that has the first
Savable = Callable[[nn.Module, Mapping[str, Any]], AbstractContextManager[None] | None]
_INTEGRATIONS: list[Savable] = []


def savable(how: Savable) -> Savable:
    """Register how a library saves quantized layers.

    Args:
        how: takes a part of a model and the fields of the `QuantConfig` that it was made with, and
            gives the context for the library's own method, or None if the part is of another
            library. It raises a `SaveError` for layers that its library could not load again.
    """
    _INTEGRATIONS.append(how)
    return how


def guard_saving(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Let each part of `model` that has quantized layers save what loads again, or refuse.

    Args:
        model: its parts with a `save_pretrained` are changed.
        options: the fields of the `QuantConfig` that the layers were made with.
    """
    for part in model.modules():
        if hasattr(type(part), GUARDED[0]) and has_quantized_layer(part):
            for name in GUARDED:
                if hasattr(type(part), name):
                    guarded = functools.partial(_save, part, name, dict(options))
                    # Libraries pass what they read in the signature, of which this is a part.
                    guarded.__wrapped__ = MethodType(getattr(type(part), name), part)  # type: ignore[attr-defined]
                    vars(part)[name] = guarded


def _save(part: nn.Module, method: str, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    for how in _INTEGRATIONS:
        context = how(part, options)
        if context is not None:
            with context:
                return getattr(type(part), method)(part, *args, **kwargs)
    raise SaveError(
        f"{type(part).__name__}.{method}",
        found="quantized layers, which the library would fill with random weights when it loads",
        needed="a folder that loads again",
        remedy="For models of transformers and sentence-transformers, import "
        "fxquant.integrations.transformers first, and fxquant.integrations.diffusers for those of "
        "diffusers. Others: save the quantized graph with fxquant.save_model, and load it into the "
        "class with fxquant.load_into(model, path).",
    )
