"""What a saved graph may name: pure tensor functions and methods, nothing that acts on the world.

`torch.overrides.get_overridable_functions` lists the functions of torch that work on tensors; a
function that reads files, loads libraries or changes global state is not among them.
"""

import builtins
import functools
import importlib
import math
import operator
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

from fxquant.errors import LoadError, SaveError, near_misses
from fxquant.graph.grouped_matmul import grouped_matmul
from fxquant.graph.structures import expect_constant, expect_shape, named_tuple, output_dict
from fxquant.modules.activation import dequantize_activation, quantize_activation
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.modules.linear_int8 import QuantizedLinearInt8
from fxquant.observers import OBSERVERS
from fxquant.tracing.replacements import (
    TraceableMultiheadAttention,
    TraceableTransformerDecoder,
    TraceableTransformerEncoder,
    TraceableTransformerEncoderLayer,
    merge_attention_masks,
)

FXQUANT_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    expect_constant,
    expect_shape,
    named_tuple,
    output_dict,
    grouped_matmul,
    merge_attention_masks,
    quantize_activation,
    dequantize_activation,
)
FXQUANT_MODULES: tuple[type[nn.Module], ...] = (
    QuantizedLinearInt4,
    QuantizedLinearInt8,
    TraceableMultiheadAttention,
    TraceableTransformerDecoder,
    TraceableTransformerEncoder,
    TraceableTransformerEncoderLayer,
    *dict.fromkeys(OBSERVERS.values()),
)
BUILTINS = ("getattr", "len", "abs", "min", "max", "int", "float", "bool", "round", "sum", "pow")
FACTORIES = (
    "arange", "zeros", "ones", "full", "empty", "eye", "linspace", "logspace", "tensor",
    "scalar_tensor", "as_tensor", "tril_indices", "triu_indices", "zeros_like", "ones_like",
    "full_like", "empty_like", "rand_like", "randn_like", "rand", "randn", "randint",
    "sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sqrt", "_assert",
)  # fmt: skip
REFUSED_METHODS = frozenset(
    ("apply_", "map_", "map2_", "register_hook", "register_post_accumulate_grad_hook", "set_",
     "numpy", "share_memory_", "storage", "untyped_storage", "data_ptr", "resize_", "resize_as_",
     "module_load", "retain_grad", "requires_grad_", "backward", "to_mkldnn", "__array__",
     "__dlpack__", "__reduce_ex__", "__setstate__", "__deepcopy__")
)  # fmt: skip
EXTRA_METHODS = frozenset(("unflatten", "new_tensor", "tolist", "eq_", "ne_"))
ATTRIBUTES = frozenset(
    (
        "shape",
        "dtype",
        "device",
        "ndim",
        "T",
        "mT",
        "H",
        "mH",
        "real",
        "imag",
        "itemsize",
        "layout",
        "values",
        "indices",
    )
)
REFUSED_OPS = frozenset(("from_file", "set_", "resize_", "_pin_memory", "pin_memory"))


@functools.cache
def functions() -> dict[str, Callable[..., Any]]:
    """Every allowed function by its name."""
    overridable = {
        f for group in torch.overrides.get_overridable_functions().values() for f in group
    }
    spaces = (torch, F, torch._C._nn, torch.linalg, torch.fft, torch.special, torch.functional)
    found: dict[str, Callable[..., Any]] = {}
    for space in spaces:
        for name in dir(space):
            value = getattr(space, name)
            if callable(value) and not isinstance(value, type) and _is_member(value, overridable):
                found.setdefault(f"{space.__name__}.{name}", value)
    for name in FACTORIES:
        found[f"torch.{name}"] = getattr(torch, name)
    for name in BUILTINS:
        found[f"builtins.{name}"] = getattr(builtins, name)
    for space in (operator, math):
        for name, value in vars(space).items():
            is_function = callable(value) and not isinstance(value, type)
            if is_function and not name.startswith("_") and name != "call":
                found[f"{space.__name__}.{name}"] = value
    for function in (*FXQUANT_FUNCTIONS, torch.fx._symbolic_trace._assert_is_none):
        found[f"{function.__module__}.{function.__name__}"] = function
    return found


@functools.cache
def _names() -> dict[int, str]:
    return {id(function): name for name, function in reversed(functions().items())}


@functools.cache
def methods() -> frozenset[str]:
    """Every allowed tensor method."""
    overridable = torch.overrides.get_overridable_functions()[torch.Tensor]
    names = {f.__name__ for f in overridable if hasattr(f, "__name__")}
    return frozenset(names | EXTRA_METHODS) - REFUSED_METHODS


@functools.cache
def module_classes() -> dict[str, type[nn.Module]]:
    """Every allowed module class by its name: torch.nn's own and fxquant's."""
    own = (nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Module, GraphModule)
    classes = [v for v in vars(nn).values() if isinstance(v, type) and issubclass(v, nn.Module)]
    return {class_name(cls): cls for cls in (*classes, *own, *FXQUANT_MODULES)}


def class_name(cls: type) -> str:
    """The importable name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def function_name(function: Any, where: str, allowed: Iterable[str] = ()) -> str:
    """The name under which `function` is saved.

    Raises:
        SaveError: it is not on the allow-list.
    """
    if isinstance(function, torch._ops.OpOverload):
        if function.namespace == "aten" and _op_name(function) not in REFUSED_OPS:
            return f"aten::{function}".replace("aten::aten.", "aten::")
    elif id(function) in _names():
        return _names()[id(function)]
    name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__name__', function)}"
    if name in set(allowed):
        return name
    raise SaveError(
        where,
        found=f"the function {name}",
        needed="functions of torch, operator, math or fxquant",
        remedy=f"Make it importable and pass allow=({name!r},) to save_model and load_model.",
    )


def resolve_function(name: str, allowed: Iterable[str] = ()) -> Any:
    """The function saved as `name`.

    Raises:
        LoadError: it is not on the allow-list.
    """
    if name.startswith("aten::"):
        packet, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(torch.ops.aten, packet, None) if packet.isidentifier() else None
        found = getattr(op, overload, None) if overload.isidentifier() else None
        if isinstance(found, torch._ops.OpOverload) and packet not in REFUSED_OPS:
            return found
    elif name in functions():
        return functions()[name]
    elif name in set(allowed):
        return _import(name)
    close = near_misses(name, functions(), count=1)
    raise LoadError(
        f"function {name!r}",
        found="a name that is not on the allow-list",
        needed="functions of torch, operator, math or fxquant",
        remedy=f"If you trust the file, pass allow=({name!r},)."
        + (f" Nearest allowed: {close[0]}." if close else ""),
    )


def resolve_class(name: str, allowed: Iterable[type[nn.Module]] = ()) -> type[nn.Module]:
    """The module class saved as `name`.

    Raises:
        LoadError: it is neither torch.nn's nor fxquant's, nor among `allowed`.
    """
    extra = {class_name(cls): cls for cls in allowed}
    if name in extra:
        return extra[name]
    if name in module_classes():
        return module_classes()[name]
    raise LoadError(
        f"module class {name!r}",
        found="a class that is neither torch.nn's nor fxquant's",
        needed="a class the caller allows",
        remedy="If you trust the file, import the class and pass allow_modules=(TheClass,).",
    )


def check_method(name: str, error: type[SaveError] | type[LoadError]) -> None:
    """Raise `error` unless `name` is an allowed tensor method."""
    if name not in methods():
        raise error(
            f"method {name!r}",
            found="a method that is not on the allow-list",
            needed="a method of torch.Tensor without side effects",
            remedy="Rewrite this step of the model with a torch function.",
        )


def _import(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise LoadError(
            f"function {name!r}",
            found=f"that it cannot be imported: {error}",
            needed="an importable function",
            remedy="Install the package that defines it.",
        ) from error
    return function


def _op_name(op: Any) -> str:
    return str(op).split(".")[1]


def _is_member(value: Any, overridable: set[Any]) -> bool:
    try:
        return value in overridable
    except TypeError:  # unhashable
        return False


def is_plain_function(value: Any) -> bool:
    """Whether `value` is a function rather than a module, a class or data."""
    return isinstance(value, FunctionType | type(len) | torch._ops.OpOverload)
