"""Put quantized modules into the user's own class, so that its methods, hooks and caches work."""

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrize

from fxquant.errors import OptionError, caller_level
from fxquant.fusion.fused import refuse_fused
from fxquant.graph.batch_norms import neutral_value
from fxquant.graph.copying import copy_owning_tensors
from fxquant.graph.graph_module import check_graph
from fxquant.graph.identity import FINGERPRINT, first_difference
from fxquant.graph.layers import replace_layer, sites, tensor_attribute, user_name
from fxquant.graph.left_alone import process_left_alone, structure_left_alone
from fxquant.measure.quantization_info import INFO_KEY
from fxquant.modules.layer import QuantizedLayer, has_quantized_layer
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.packed_parameter import FloatParameter, PackedParameter, hand_over
from fxquant.modules.rounded_input import RoundedInput
from fxquant.modules.weight_forms import form_of
from fxquant.passes.fold_norms import FoldedNorm
from fxquant.passes.pack_parameters import packed_parameters
from fxquant.passes.quantize_activations import static_grids
from fxquant.passes.quantize_products import rounded_products
from fxquant.passes.rewrite import share_tables
from fxquant.pretrained import guard_saving
from fxquant.serialization.files import load_model
from fxquant.tracing.offload import loaded
from fxquant.tracing.prepare import COMPUTING_HOOKS, computes_tensors, prepared_alone, unwrap
from fxquant.tracing.product_only import is_product_only
from fxquant.tracing.trace_report import REPORT_KEY, TraceReport

M = TypeVar("M", bound=nn.Module)
LEFT_FLOAT = "fxquant_left_float"
FLOAT_INPUTS = "fxquant_float_inputs"


class LeftFloatWarning(UserWarning):
    """Some of what is quantized in the graph has no place in the user's model and stays float."""


def swap_modules(model: M, qmodel: GraphModule, *, share_memory: bool = False) -> M:
    """A copy of `model` in which the quantized layers of `qmodel` do the work.

    Args:
        model: the model that was quantized; it is not changed.
        qmodel: the quantized graph.
        share_memory: let what stays float lie in the memory of `model`, instead of copying it.

    Returns:
        A copy of the same class, whose outputs are those of the graph. A parameter that the model's
        own code multiplies with, such as the matrices of a mixture's experts or the packed input
        projection of `nn.MultiheadAttention`, becomes a `PackedParameter`; outputs then agree with
        the graph's up to the order of sums, since that code may multiply in another order. Layers
        that are neither, such as parts of one parameter, or whose class does more than a linear
        layer, stay float: they are listed in the copy's `fxquant_left_float` and in a
        `LeftFloatWarning`. Inputs that the graph rounds with a static grid are rounded in the copy
        by a `RoundedInput` around the layer. `fxquant_float_inputs` lists layers that have no such
        place, and products of two values whose factors the graph rounds; the same warning names
        them. A BatchNorm that is folded into a layer does nothing in evaluation mode.

    Raises:
        OptionError: `qmodel` was made from another model, is fused, or has a channel scale folded
            into a layer that would stay float.
    """
    inner = loaded(model)
    check_graph("qmodel", qmodel)
    with process_left_alone(), structure_left_alone(inner):
        return _swapped(inner, qmodel, share_memory)  # type: ignore[return-value]


def _swapped(inner: nn.Module, qmodel: GraphModule, share_memory: bool) -> nn.Module:
    _check_same_model(inner, qmodel, values=True)
    # Only folded scales change what stays float. The rest is the model's own: an adapter may be
    # merged in the graph, which is in evaluation mode, and not yet in the model.
    is_changed = bool((qmodel.meta.get(INFO_KEY) or {}).get("folded_scales"))
    plan = _plan(inner, qmodel, with_tensors=is_changed)
    replaced = {inner.get_submodule(name) for name in plan.modules}
    keep = (lambda _: True) if share_memory else replaced.__contains__
    return _apply(copy_owning_tensors(inner, keep=keep), plan)


def load_into(model: M, path: str | os.PathLike[str]) -> M:
    """Load a saved model into `model` itself, and return it.

    Args:
        model: a model of the class that was quantized, whatever its weights; it is changed, or left
            as it was if this fails.
        path: a file that `save_model` wrote.

    Raises:
        LoadError: the file cannot be loaded.
        OptionError: the file holds another model, or not all that this one needs.
    """
    qmodel = load_model(path)
    inner = unwrap(model)
    for name, parameter in inner.named_parameters():
        if parameter.is_meta:
            raise OptionError(
                f"load_into, {name}",
                found="a tensor on the meta device",
                needed="a model whose tensors have memory, whatever is in it",
                remedy="Make the model outside of torch.device('meta').",
            )
    _check_same_model(inner, qmodel, values=False)
    plan = _plan(inner, qmodel, with_tensors=True)
    if plan.left_float and first_difference(qmodel.meta.get(FINGERPRINT, {}), inner, values=True):
        raise OptionError(
            os.fspath(path),
            found=f"no float weights for {', '.join(plan.left_float[:3])}, which are no modules of "
            "their own in the model",
            needed="a model that has the weights that were quantized",
            remedy="Load the float checkpoint into the model first, or use fxquant.load_model.",
        )
    _apply(inner, plan)
    return model


@dataclass
class _Plan:
    """What changes in a model, worked out before anything is changed.

    Attributes:
        modules: quantized layers by the names of those that they replace.
        parameters: what takes the place of parameters, by their names.
        tensors: parameters and buffers that are taken over, by name.
        neutral: one value for all elements of each tensor of a norm that is folded, by name.
        left_float: names of layers that have no module of their own.
        float_inputs: names of layers whose input is rounded in the graph alone, and of products
            whose factors are.
        options: the fields of the `QuantConfig` that the layers were made with.
    """

    modules: dict[str, QuantizedLayer] = field(default_factory=dict)
    parameters: dict[str, PackedParameter] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    neutral: dict[str, float] = field(default_factory=dict)
    left_float: list[str] = field(default_factory=list)
    float_inputs: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def _check_same_model(model: nn.Module, qmodel: GraphModule, *, values: bool) -> None:
    known = qmodel.meta.get(FINGERPRINT)
    different = first_difference(known, model, values=values) if known else None
    if different is not None:
        raise _other_model(*different)


def _plan(model: nn.Module, qmodel: GraphModule, *, with_tensors: bool) -> _Plan:
    """What is to be replaced, and which float tensors are taken over."""
    refuse_fused("swap_modules", qmodel)
    plan = _Plan(options=(qmodel.meta.get(INFO_KEY) or {}).get("config") or {})
    own = dict(model.named_modules(remove_duplicate=False))
    own["model"] = own.get("model", model)
    unmatched: list[str] = []
    own_bias: list[str] = []  # of layers whose bias is the model's own, which nobody scales
    report = qmodel.meta.get(REPORT_KEY)
    read_only = set(report.read_only) if isinstance(report, TraceReport) else set()
    packed = packed_parameters(model, qmodel)
    parameter_of = {layer: name for name, (_, layers) in packed.items() for layer in layers}
    grids, rounded = static_grids(qmodel), set[str]()
    for site in sites(qmodel):
        original = own.get(site.name)
        if isinstance(site.module, QuantizedLayer):
            is_own = site.name not in read_only
            if original is not None and is_own and may_become(original, site.module):
                layer, grid = site.module, grids.get(site.name)
                if grid is not None:
                    layer = RoundedInput.of(layer, *grid)
                    rounded.add(site.name)
                plan.modules["" if original is model else site.name] = layer
            elif site.name in parameter_of:
                parameter = parameter_of[site.name]
                plan.parameters[parameter] = packed[parameter][0]
                if isinstance(packed[parameter][0].layer, RoundedInput):
                    rounded.add(site.name)
                if getattr(site.module, "bias", None) is not None:
                    own_bias.append(site.name)
            else:
                plan.left_float.append(site.name)
                unmatched.append(site.name)
        elif original is not None and type(original) is type(site.module):
            for name, tensor in (*site.module.named_parameters(), *site.module.named_buffers()):
                _note_tensor(plan, model, f"{site.name}.{name}", tensor)
        elif next(site.module.parameters(), None) is not None and not site.is_inside:
            unmatched.append(site.name)
    for node in qmodel.graph.nodes:
        if node.op == "get_attr":
            value = tensor_attribute(qmodel, node)
            _note_tensor(plan, model, user_name(qmodel, str(node.target)), value)
    if not with_tensors:
        plan.tensors.clear()
    for folded in (qmodel.meta.get(INFO_KEY) or {}).get("folded_norms", ()):
        if folded["layer"] in plan.modules:
            _note_neutral(plan, model, FoldedNorm(**folded))
    plan.left_float = list(dict.fromkeys(plan.left_float))
    plan.float_inputs = [n for n in grids if n not in rounded and n not in plan.left_float]
    plan.float_inputs += rounded_products(qmodel)
    _check_scales(qmodel, unmatched, own_bias)
    return plan


def _check_scales(qmodel: GraphModule, unmatched: list[str], own_bias: list[str]) -> None:
    """Refuse if one side of a folded scale would be taken over and the other not."""
    for folded in (qmodel.meta.get(INFO_KEY) or {}).get("folded_scales", ()):
        missing = [n for n in (*folded["producers"], *folded["readers"]) if n in unmatched]
        missing += [n for n in folded["producers"] if n in own_bias]
        if missing:
            raise OptionError(
                "swap_modules",
                found=f"a channel scale folded into {', '.join(missing)}, which the model holds in "
                "another form",
                needed="layers that are modules of the same class in the model",
                remedy="Use the graph itself, or quantize with a method without awq or "
                "smoothquant.",
            )


def _note_tensor(plan: _Plan, model: nn.Module, name: str, value: object) -> None:
    """Take over a float parameter or a buffer: it may differ, or quantizing has changed it."""
    current = _tensor_of(model, name)
    if current is None or not isinstance(value, Tensor):
        return
    if current.shape != value.shape:
        raise _other_model(name, f"shapes {list(current.shape)} and {list(value.shape)}")
    if not torch.equal(current, value.to(current.dtype)):
        plan.tensors[name] = value


def _note_neutral(plan: _Plan, model: nn.Module, folded: FoldedNorm) -> None:
    """Let a norm do nothing, since it is in the layer before it already."""
    for role, name in folded.tensors.items():
        if _tensor_of(model, name) is None:
            raise OptionError(
                "swap_modules",
                found=f"a BatchNorm folded into {folded.layer}, whose {role} is no tensor {name} "
                "of the model",
                needed="a norm whose tensors the model holds as parameters or buffers",
                remedy="Use the graph itself, or keep the norm out of the layer: name it in "
                "modules_to_not_convert.",
            )
        plan.neutral[name] = neutral_value(role, folded.eps)


def _tensor_of(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer called `name`, or None."""
    owner, _, key = name.rpartition(".")
    try:
        part = model.get_submodule(owner)
    except AttributeError:
        return None
    for tensors in (part._parameters, part._buffers):
        if key in tensors:  # of a scripted module these are no dicts, and lack `get`
            return tensors[key]
    return None


def may_become(original: nn.Module, quantized: QuantizedLayer) -> bool:
    """Whether the quantized layer computes what `original` does, up to the values of the weight."""
    if isinstance(quantized, RoundedInput):
        return may_become(original, quantized.layer)
    if isinstance(quantized, QuantizedLinear):
        return is_product_only(original) and _fits(original, quantized)
    if isinstance(quantized, PackedParameter):
        return isinstance(original, FloatParameter) and (
            quantized.weight_shape == original.weight.shape
        )
    if computes_tensors(original):  # by weight norm, say
        original = prepared_alone(original)
    form = form_of(original)
    if form is None or not isinstance(original, type(quantized).replaces):
        return False
    return form.matrix(original).shape == quantized.quantized_weight.shape


def _fits(original: nn.Module, quantized: QuantizedLinear) -> bool:
    """Whether the layer has the quantized one's weight, rather than one of which that is a part."""
    needed = sorted((quantized.in_features, quantized.out_features))
    if isinstance(original, nn.Linear) and original._parameters.get("weight") is not None:
        return sorted(original.weight.shape) == needed
    if isinstance(original, nn.Linear):  # its weight is computed
        return sorted((original.in_features, original.out_features)) == needed
    # A transposed layout, as GPT-2's Conv1D has, is the same layer.
    return any(sorted(p.shape) == needed for p in original.parameters())


def _apply(model: nn.Module, plan: _Plan) -> nn.Module:
    """Replace the layers and take over tensors: objects stay, what they hold changes."""
    for name, value in plan.tensors.items():
        current = _held(model, name)
        current.data = value.detach().to(current.dtype).clone()
    for name, number in plan.neutral.items():
        current = _held(model, name)
        current.data = torch.full_like(current, number)
    memo: dict[int, Any] = {}  # one for all: what they share, their copies share
    for name, quantized in plan.modules.items():
        layer = model.get_submodule(name)
        if isinstance(layer, QuantizedLayer):  # one layer under two names
            continue
        if parametrize.is_parametrized(layer):
            layer.__class__ = type(layer).__bases__[0]
        for key, hook in list(layer._forward_pre_hooks.items()):
            if isinstance(hook, COMPUTING_HOOKS):
                del layer._forward_pre_hooks[key]
                vars(layer).pop("weight", None)
        mode = layer.training
        replace_layer(layer, copy.deepcopy(quantized, memo))
        layer.training = mode
    for name, packed in plan.parameters.items():
        replace_layer(hand_over(model, name), copy.deepcopy(packed, memo))
    share_tables(model)
    finish_quantized(model, plan.options)
    setattr(model, LEFT_FLOAT, plan.left_float)
    setattr(model, FLOAT_INPUTS, plan.float_inputs)
    texts = []
    if plan.left_float:
        names = ", ".join(plan.left_float)
        texts.append(f"these layers have no module of their own and stay float: {names}")
    if plan.float_inputs:
        names = ", ".join(plan.float_inputs)
        texts.append(f"what these read is rounded in the graph alone: {names}")
    if texts:
        warnings.warn("; ".join(texts), LeftFloatWarning, caller_level())
    return model


def _held(model: nn.Module, name: str) -> Tensor:
    tensor = _tensor_of(model, name)
    assert tensor is not None  # the plan names tensors of the model
    return tensor


def finish_quantized(model: nn.Module, options: Mapping[str, Any] | None = None) -> None:
    """Keep code that reads weights itself away from a model whose layers were replaced.

    Args:
        model: is changed.
        options: the fields of the `QuantConfig` that the layers were made with, where known.
    """
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoderLayer) and has_quantized_layer(part):
            part.activation_relu_or_gelu = 0  # torch's fast path would read the weights itself
    guard_saving(model, options or {})


def _other_model(where: str, found: str) -> OptionError:
    return OptionError(
        where,
        found=found,
        needed="the model that was quantized",
        remedy="Pass a model of the same class and configuration, or quantize this one.",
    )
