"""A working copy of the model: same memory, own structure, weights as the model uses them."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxquant.errors import OptionError, TraceError, check_type
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.left_alone import WrittenMemory, evaluate, left_alone, process_left_alone
from fxquant.tracing.replacements import replace_untraceable_layers

COMPUTING_HOOKS = (prune.BasePruningMethod, WeightNorm, SpectralNorm)


def unwrap(model: Any) -> nn.Module:
    """The model inside the wrappers of `torch.compile` and data parallelism.

    Raises:
        OptionError: it is no module, or one whose code is TorchScript.
    """
    while True:
        inner = model._orig_mod if hasattr(model, "_orig_mod") else None
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    check_type("model", model, nn.Module, "Pass the model itself, not its path or its output.")
    if isinstance(model, torch.jit.ScriptModule):
        raise OptionError(
            "model",
            found="a TorchScript module, whose code cannot be traced",
            needed="the Python module it was made from",
            remedy="Quantize the original model; script or trace the quantized graph afterwards.",
        )
    return model


def prepare(model: nn.Module, memory: WrittenMemory) -> nn.Module:
    """Copy `model`, make computed weights plain and attention layers traceable.

    Args:
        model: in evaluation mode; it is not changed.
        memory: what was written since the model was as the user left it (adapters merged by
            `eval()`, say): the copy keeps that, in memory of its own.
    """
    prepared = copy_sharing_tensors(model, is_own=memory.is_written)
    with torch.no_grad():
        for module in list(prepared.modules()):
            if parametrize.is_parametrized(module):
                _make_parametrizations_plain(module)
            _make_computed_weights_plain(module)
            if isinstance(module, nn.Linear) and isinstance(module.weight, Tensor):
                # A weight that was cut or replaced: the forward looks at it alone.
                module.out_features, module.in_features = module.weight.shape
    return replace_untraceable_layers(prepared)


def prepared_alone(module: nn.Module) -> nn.Module:
    """The working copy of one module, in evaluation mode; the module is left as it was."""
    with process_left_alone(), left_alone(module) as memory:
        evaluate(module)
        return prepare(module, memory)


def computes_tensors(layer: nn.Module) -> bool:
    """Whether a parametrization or a hook of torch's makes one of its tensors for each call."""
    hooks = layer._forward_pre_hooks.values()
    is_parametrized = bool(parametrize.is_parametrized(layer))
    return is_parametrized or any(isinstance(hook, COMPUTING_HOOKS) for hook in hooks)


def check_initialized(model: nn.Module) -> None:
    """Raise a `TraceError` that names a lazy parameter."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise TraceError(
                name,
                found="a lazy parameter without a shape",
                needed="parameters with values",
                remedy="Run the model once on real inputs, then quantize it.",
            )


def _make_parametrizations_plain(module: nn.Module) -> None:
    """Let each parametrized tensor be a parameter with the value that the model would use now."""
    names = list(cast(nn.ModuleDict, module.parametrizations))
    values = {name: getattr(module, name).detach().clone() for name in names}
    module.__class__ = type(module).__bases__[0]  # the class without the computing properties
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _make_computed_weights_plain(module: nn.Module) -> None:
    """Run the hooks that compute a weight before each forward once, and drop them."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if not isinstance(hook, COMPUTING_HOOKS):
            continue
        name = cast(str, hook._tensor_name if hasattr(hook, "_tensor_name") else hook.name)
        hook(module, ())
        value: Tensor = getattr(module, name)
        del module._forward_pre_hooks[key]
        for suffix in ("_orig", "_g", "_v", "_mask", "_u"):
            module._parameters.pop(name + suffix, None)
            module._buffers.pop(name + suffix, None)
        vars(module).pop(name, None)
        module._buffers.pop(name, None)
        module.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))
