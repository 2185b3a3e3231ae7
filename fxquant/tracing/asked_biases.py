"""Layers without a bias, of which the model's own code asks whether they have one.

A quantized layer mostly gets a bias that corrects the mean of its rounding. In a swapped copy the
model's code runs, and `if self.fc.bias is None:` would go another way than it did for the graph.
"""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxquant.tracing.branches import is_tool

_CLASSES = (nn.Linear, nn.modules.conv._ConvNd)


@contextmanager
def asking() -> Iterator[set[nn.Module]]:
    """The layers that code running inside asks for a bias which they do not have."""
    asked: set[nn.Module] = set()

    def find(module: Any, name: str) -> Any:
        value = nn.Module.__getattr__(module, name)
        if name == "bias" and value is None and not is_tool(sys._getframe(1)):
            asked.add(module)
        return value

    for kind in _CLASSES:
        kind.__getattr__ = find  # type: ignore[method-assign]
    try:
        yield asked
    finally:
        for kind in _CLASSES:
            del kind.__getattr__


def names_of(asked: Collection[nn.Module], *models: nn.Module) -> list[str]:
    """The paths that these modules have in the models."""
    found = (
        name for model in models for name, part in model.named_modules(remove_duplicate=False)
        if part in asked
    )  # fmt: skip
    return sorted(set(found))
