"""Modules by class, constructor arguments and tensors: described, and built again.

Nothing is patched: a module of a file is what its constructor makes of arguments that were checked,
on torch's meta device so that it costs no memory; then the tensors of the file take the places of
those that the constructor made, whose names, shapes and kinds they must have. So no weight of a
recurrent layer, say, can be shorter than its kernel expects.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import FxquantError
from fxquant.modules.conv import QuantizedConv
from fxquant.modules.embedding import QuantizedEmbedding
from fxquant.modules.embedding_bag import QuantizedEmbeddingBag
from fxquant.modules.fused_linear import FusedLinear
from fxquant.modules.gated_linear import GatedLinear
from fxquant.modules.grouped_linear import GroupedLinear, QuantizedGroupedLinear
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.packed_parameter import PackedParameter
from fxquant.modules.rounded_input import RoundedInput
from fxquant.observers import OBSERVERS
from fxquant.serialization.layer_table import (
    RECURRENT,
    argument_names,
    fits,
    read_argument,
    torch_classes,
)
from fxquant.tracing.replacements import (
    PROJECTIONS,
    TraceableMultiheadAttention,
    TraceableTransformerDecoder,
    TraceableTransformerEncoder,
    TraceableTransformerEncoderLayer,
)

INTERNAL = frozenset(vars(nn.Module())) | {"training"}
# Attributes that a module makes again by itself.
_DERIVED = frozenset(("_flat_weights", "_flat_weight_refs"))
# They hold others and have no code that reads tensors; what they hold is not fixed by arguments.
HOLDERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList,
           nn.ParameterDict)  # fmt: skip
_STACKS = (nn.TransformerEncoder, nn.TransformerDecoder, TraceableTransformerEncoder,
           TraceableTransformerDecoder)  # fmt: skip
_STACK_FLAGS = ("enable_nested_tensor", "use_nested_tensor", "mask_check")
_ATTENTION = ("embed_dim", "num_heads", "head_dim", "batch_first", "is_packed")
# A child that the constructor made may be one of these instead.
_STANDS_FOR: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.Linear: (QuantizedLinear, RoundedInput),
    QuantizedGroupedLinear: (RoundedInput,),
    nn.modules.linear.NonDynamicallyQuantizableLinear: (QuantizedLinear, nn.Linear),
    QuantizedLayer: (QuantizedLayer,),
    nn.MultiheadAttention: (TraceableMultiheadAttention,),
}


def class_name(cls: type) -> str:
    """The importable name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


_OBSERVERS = {class_name(cls): cls for cls in dict.fromkeys(OBSERVERS.values())}
_OWN: dict[str, type[nn.Module]] = {
    class_name(cls): cls
    for cls in (
        *HOLDERS, *_STACKS, TraceableMultiheadAttention, TraceableTransformerEncoderLayer,
        QuantizedEmbedding, QuantizedEmbeddingBag, GroupedLinear, QuantizedGroupedLinear,
        QuantizedConv, FusedLinear, GatedLinear, PackedParameter,
        RoundedInput,
    )
} | _OBSERVERS  # fmt: skip


def known_classes() -> dict[str, type[nn.Module]]:
    """The classes that are built from arguments, by name."""
    return {**torch_classes(), **_OWN}


class UnfitError(Exception):
    """A module is not what its class and arguments make; the text says in what."""


def arguments_of(module: nn.Module) -> dict[str, Any]:
    """The arguments that make `module` again; whether they do is for `difference` to say."""
    cls = type(module)
    if cls in HOLDERS:
        return {}
    if cls in _STACKS:
        flags = {name: getattr(module, name) for name in _STACK_FLAGS if hasattr(module, name)}
        return {"num_layers": module.num_layers, **flags}
    if cls is TraceableMultiheadAttention:
        return {name: getattr(module, name) for name in _ATTENTION}
    if cls in _OBSERVERS.values():
        observer: Any = module
        marks = {"node_name": observer.node_name, "batch": observer.batch}
        return {**observer._options(), **marks}
    return {name: read_argument(module, name) for name in argument_names(cls)}


def construct(cls: type[nn.Module], arguments: dict[str, Any]) -> nn.Module:
    """What the constructor of a known class makes of checked arguments, on the meta device.

    Raises:
        UnfitError: an argument has another type or range, or the constructor refuses them.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            return _construct(cls, dict(arguments))
    except (UnfitError, RecursionError):
        raise
    except (FxquantError, ValueError, TypeError, RuntimeError, KeyError, AssertionError,
            AttributeError, ArithmeticError, IndexError, NotImplementedError) as error:  # fmt: skip
        raise UnfitError(f"arguments that {cls.__name__} refuses: {error}") from error


def _construct(cls: type[nn.Module], arguments: dict[str, Any]) -> nn.Module:
    if cls in HOLDERS:
        _check_names(cls, arguments, ())
        return cls()
    if cls in _STACKS:
        return _stack(cls, arguments)
    if cls is TraceableMultiheadAttention:
        return _attention(arguments)
    if cls in _OBSERVERS.values():
        return _observer(cls, arguments)
    _check_names(cls, arguments, argument_names(cls))
    for name, value in arguments.items():
        if not fits(name, value):
            raise UnfitError(f"{name}={value!r:.80}")
    return cls(**arguments)


def _check_names(cls: type, arguments: dict[str, Any], names: tuple[str, ...]) -> None:
    if set(arguments) != set(names):
        raise UnfitError(f"arguments {sorted(arguments)} of {cls.__name__}, not {sorted(names)}")


def _blank(cls: type[nn.Module], attributes: dict[str, Any]) -> nn.Module:
    """A module without its constructor, for those that are made from another module."""
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    vars(made).update(attributes)
    return made


def _stack(cls: type[nn.Module], arguments: dict[str, Any]) -> nn.Module:
    is_encoder = issubclass(cls, nn.TransformerEncoder)
    _check_names(cls, arguments, ("num_layers", *(_STACK_FLAGS if is_encoder else ())))
    count = arguments["num_layers"]
    if not fits("num_layers", count):
        raise UnfitError(f"num_layers={count!r:.80}")
    if not all(type(arguments.get(name, True)) is bool for name in _STACK_FLAGS):
        raise UnfitError("an option that is neither true nor false")
    made = _blank(cls, arguments)
    made.add_module("layers", nn.ModuleList())
    made.add_module("norm", None)
    return made


def _attention(arguments: dict[str, Any]) -> nn.Module:
    _check_names(TraceableMultiheadAttention, arguments, _ATTENTION)
    for name, value in arguments.items():
        if not fits(name, value):
            raise UnfitError(f"{name}={value!r:.80}")
    is_packed, width = arguments["is_packed"], arguments["embed_dim"]
    names = PROJECTIONS if is_packed else ("q_proj", "k_proj", "v_proj")
    made = _blank(TraceableMultiheadAttention, {**arguments, "projections": names})
    for name in ("in_proj",) * is_packed + (*names, "out_proj"):
        made.add_module(name, nn.Linear(width, width))
    return made


def _observer(cls: type[Any], arguments: dict[str, Any]) -> nn.Module:
    node_name, batch = arguments.pop("node_name", None), arguments.pop("batch", None)
    if not isinstance(node_name, str) or type(batch) is not int:
        raise UnfitError("an observer without a node")
    bins = arguments.get("bins", 2)
    if type(bins) is not int or bins > 1 << 24 or type(arguments.get("symmetric")) is not bool:
        raise UnfitError("options of an observer")
    observer: nn.Module = cls(**arguments)
    vars(observer).update(node_name=node_name, batch=batch)
    return observer


def difference(made: nn.Module, module: nn.Module) -> str | None:
    """In what `module` differs from what its arguments make, or None.

    Attributes that the class knows nothing of do not count: its code does not read them.
    """
    for kind in ("_parameters", "_buffers"):
        here, there = getattr(module, kind), getattr(made, kind)
        if type(module) in HOLDERS:
            continue
        if set(here) != set(there):
            names = sorted(set(here) ^ set(there))
            return f"tensors of its own that its class does not have, or the reverse: {names}"
        for name, tensor in here.items():
            fault = _fault(there[name], tensor, type(module))
            if fault is not None:
                return f"{name}: {fault}"
    for name, value in vars(made).items():
        is_size = isinstance(module, nn.Linear) and name in ("in_features", "out_features")
        if name in INTERNAL or name in _DERIVED or is_size or name == "activation_relu_or_gelu":
            continue
        if name not in vars(module) or not _equal(value, vars(module)[name]):
            found = vars(module).get(name)
            return f"{name} = {found!r:.80}, not {value!r:.80} as its arguments make it"
    return None


def _equal(one: Any, other: Any) -> bool:
    """Whether two attributes say the same; a tuple and a list of the same sizes do."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one is other or bool(one == other)


def _fault(made: Tensor | None, given: Tensor | None, cls: type) -> str | None:
    """Why `given` cannot take the place of a tensor of the constructor, or None."""
    if given is None:
        return "no tensor" if made is not None and issubclass(cls, RECURRENT) else None
    if made is None:
        return "a tensor where there is none"
    if made.shape != given.shape:
        return f"shape {list(given.shape)} instead of {list(made.shape)}"
    same_kind = made.is_floating_point() and (given.is_floating_point() or given.is_complex())
    if not same_kind and made.dtype != given.dtype:
        return f"{given.dtype} instead of {made.dtype}"
    if given.layout is not torch.strided or given.is_quantized:
        return "another layout"
    return None


def fill(
    made: nn.Module,
    parameters: dict[str, nn.Parameter | None],
    buffers: dict[str, Tensor | None],
    children: dict[str, nn.Module | None],
) -> nn.Module:
    """Put tensors and children in the places of those that the constructor made.

    Raises:
        UnfitError: one is missing, too many, or of another shape or kind.
    """
    own = {k: v for k, v in [*parameters.items(), *buffers.items()] if v is not None}
    if type(made) in HOLDERS:
        _hold(made, parameters, buffers)
    else:
        for kind, given in (("_parameters", parameters), ("_buffers", buffers)):
            places: dict[str, Any] = getattr(made, kind)
            if set(places) != set(given):
                raise UnfitError(f"tensors {sorted(given)} instead of {sorted(places)}")
            for name, tensor in given.items():
                fault = _fault(places[name], tensor, type(made))
                if fault is not None:
                    raise UnfitError(f"{name}: {fault}")
                places[name] = tensor
    dtypes = {tensor.dtype for tensor in own.values()}
    is_even = len(dtypes) <= 1 and all(tensor.is_contiguous() for tensor in own.values())
    if isinstance(made, RECURRENT) and not is_even:
        raise UnfitError("weights of a recurrent layer in several dtypes or layouts")
    _fill_children(made, children)
    if isinstance(made, nn.RNNBase):
        made._init_flat_weights()
    if isinstance(made, nn.TransformerEncoderLayer) and any(
        isinstance(part, QuantizedLinear) for part in made.modules()
    ):
        made.activation_relu_or_gelu = 0  # torch's fast path would read the weights itself
    return made


def _hold(made: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
    if isinstance(made, nn.ParameterList):
        if list(parameters) != [str(i) for i in range(len(parameters))]:
            raise UnfitError("a list of parameters with other names than numbers")
        made.extend(parameters.values())
    elif isinstance(made, nn.ParameterDict):
        made.update(parameters)
    elif type(made) is nn.Module:
        made._parameters.update(parameters)
        made._buffers.update(buffers)
        return
    elif parameters:
        raise UnfitError(f"parameters of a {type(made).__name__}")
    if buffers:
        raise UnfitError(f"buffers of a {type(made).__name__}")


def _fill_children(made: nn.Module, children: dict[str, nn.Module | None]) -> None:
    if type(made) not in HOLDERS:
        if set(children) != set(made._modules):
            raise UnfitError(f"children {sorted(children)} instead of {sorted(made._modules)}")
        for name, child in children.items():
            place = made._modules[name]
            is_norm = isinstance(made, _STACKS) and name == "norm"
            if not is_norm and not _may_stand_for(child, place):
                raise UnfitError(f"another child {name!r} than its arguments make")
    elif children and isinstance(made, nn.ParameterList | nn.ParameterDict):
        raise UnfitError(f"children of a {type(made).__name__}")
    made._modules.update(children)


def _may_stand_for(child: nn.Module | None, place: nn.Module | None) -> bool:
    if child is None or place is None:
        return child is place
    if type(child) is not type(place) and not isinstance(child, _STANDS_FOR.get(type(place), ())):
        return False
    return all(
        getattr(child, name, size) == size
        for name in ("in_features", "out_features", "embed_dim", "num_heads", "normalized_shape")
        if (size := getattr(place, name, None)) is not None
    )
