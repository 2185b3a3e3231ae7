"""A working copy of the user's model: same tensors, own structure, eval mode."""

from typing import cast

from torch import nn
from torch.nn.utils import parametrize

from fxquant.graph.copying import copy_sharing_tensors
from fxquant.tracing.replacements import replace_untraceable_layers


def prepare(model: nn.Module) -> nn.Module:
    """Copy `model`, make its parametrizations plain and its attention layers traceable."""
    prepared = copy_sharing_tensors(model).eval()
    for module in list(prepared.modules()):
        if parametrize.is_parametrized(module):
            # The class made for a parametrized module is shared with the original, and removing
            # a parametrization deletes a property of it.
            own = type(module)
            module.__class__ = type(own.__name__, own.__bases__, dict(own.__dict__))
            for name in list(cast(nn.ModuleDict, module.parametrizations)):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return replace_untraceable_layers(prepared)
