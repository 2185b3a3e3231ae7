"""Put quantized modules into the user's own class, so that its methods, hooks and caches work."""

import os
import warnings
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.analysis.graph_view import INFO_KEY
from fxquant.errors import OptionError
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.scopes import scopes, sites, tensor_attribute
from fxquant.modules.linear import QuantizedLinear
from fxquant.serialization.files import load_model

M = TypeVar("M", bound=nn.Module)
LEFT_FLOAT = "fxquant_left_float"


class LeftFloatWarning(UserWarning):
    """Some quantized layers have no module of their own in the user's model."""


def swap_modules(model: M, qmodel: GraphModule) -> M:
    """A copy of `model` in which the quantized layers of `qmodel` do the work.

    Args:
        model: the model that was quantized; it is not changed.
        qmodel: the quantized graph.

    Returns:
        A copy of the same class. Layers that are no module of their own, such as the packed input
        projection of `nn.MultiheadAttention`, stay float: they are listed in the copy's
        `fxquant_left_float` and in a `LeftFloatWarning`.

    Raises:
        OptionError: `qmodel` was made from another model, or has a channel scale folded into a
            layer that would stay float.
    """
    return _apply(copy_sharing_tensors(model), _plan(model, qmodel))


def load_into(model: M, path: str | os.PathLike[str]) -> M:
    """Load a saved model into `model` itself, and return it.

    Args:
        model: a model of the class that was quantized; it is changed, or left as it was if this
            fails.
        path: a file that `save_model` wrote.

    Raises:
        LoadError: the file cannot be loaded.
        OptionError: the file holds another model.
    """
    return _apply(model, _plan(model, load_model(path)))


@dataclass
class _Plan:
    """What changes in a model, worked out before anything is changed."""

    modules: dict[str, QuantizedLinear] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    left_float: list[str] = field(default_factory=list)


def _plan(model: nn.Module, qmodel: GraphModule) -> _Plan:
    plan = _Plan()
    own = dict(model.named_modules(remove_duplicate=False))
    unmatched: list[str] = []
    for site in sites(qmodel):
        original = own.get(site.name)
        if isinstance(site.module, QuantizedLinear):
            weight = getattr(original, "weight", None)
            if original is None or not isinstance(weight, Tensor):
                plan.left_float.append(site.name)
                unmatched.append(site.name)
            else:
                _check_same_layer(site.name, weight, site.module)
                plan.modules[site.name] = site.module
        elif type(original) is type(site.module):
            for name, parameter in site.module.named_parameters():
                _note_parameter(plan, model, f"{site.name}.{name}", parameter)
        elif next(site.module.parameters(), None) is not None:
            unmatched.append(site.name)
    for scope in scopes(qmodel):
        for node in scope.gm.graph.nodes:
            if node.op == "get_attr":
                value = tensor_attribute(scope.gm, node)
                _note_parameter(plan, model, scope.name_of(str(node.target)), value)
    if not plan.modules and not plan.left_float and not plan.parameters:
        raise _other_model("model", "no layer that both have")
    _check_scales(qmodel, unmatched)
    return plan


def _check_scales(qmodel: GraphModule, unmatched: list[str]) -> None:
    """Refuse if one side of a folded scale would be taken over and the other not."""
    for folded in qmodel.meta.get(INFO_KEY, {}).get("folded_scales", ()):
        missing = [n for n in (*folded["producers"], *folded["readers"]) if n in unmatched]
        if missing:
            raise OptionError(
                "swap_modules",
                found=f"a channel scale folded into {', '.join(missing)}, which the model holds in "
                "another form",
                needed="layers that are modules of the same class in the model",
                remedy="Use the graph itself, or quantize with a method without awq or "
                "smoothquant.",
            )


def _note_parameter(plan: _Plan, model: nn.Module, name: str, value: object) -> None:
    """Take over a float parameter: quantizing may have changed it."""
    owner, _, key = name.rpartition(".")
    try:
        current = model.get_submodule(owner)._parameters.get(key)
    except AttributeError:
        return
    if current is None or not isinstance(value, nn.Parameter):
        return
    if current.shape != value.shape:
        raise _other_model(name, f"shapes {list(current.shape)} and {list(value.shape)}")
    if current.data_ptr() != value.data_ptr():
        plan.parameters[name] = value


def _check_same_layer(name: str, weight: Tensor, quantized: QuantizedLinear) -> None:
    shape = sorted(weight.shape)  # a transposed layout, as GPT-2's Conv1D has, is the same layer
    if shape != sorted((quantized.in_features, quantized.out_features)):
        needed = [quantized.out_features, quantized.in_features]
        raise _other_model(name, f"weights of shapes {list(weight.shape)} and {needed}")


def _apply(model: M, plan: _Plan) -> M:
    for name, parameter in plan.parameters.items():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._parameters[key] = parameter
    for name, module in plan.modules.items():
        model.set_submodule(name, module)
    setattr(model, LEFT_FLOAT, plan.left_float)
    if plan.left_float:
        names = ", ".join(plan.left_float)
        text = f"these layers have no module of their own and stay float: {names}"
        warnings.warn(text, LeftFloatWarning, stacklevel=3)
    return model


def _other_model(where: str, found: str) -> OptionError:
    return OptionError(
        where,
        found=found,
        needed="the model that was quantized",
        remedy="Pass a model of the same class and configuration.",
    )
