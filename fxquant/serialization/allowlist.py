"""What a saved graph may name, and how: the table of ops, fxquant's own functions, the caller's.

Which ops those are, and why, says `graph.saved_ops`; which modules, `layer_table`.
"""

import functools
import importlib
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from fxquant.errors import LoadError, SaveError, near_misses
from fxquant.graph.grouped_matmul import grouped_matmul
from fxquant.graph.loops import loop
from fxquant.graph.saved_ops import saved_functions, saved_methods, saved_overload
from fxquant.graph.strided_view import strided_view
from fxquant.graph.structures import (
    dtype_limit,
    expect_constant,
    expect_shape,
    expect_values,
    named_result,
    named_tuple,
    output_dict,
)
from fxquant.kernels.attention import attention
from fxquant.kernels.norm import add_and_norm, norm
from fxquant.kernels.pooling import max_pool
from fxquant.modules.activation import (
    dequantize_activation,
    quantize_activation,
    rounded_vectors,
)
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.modules.linear_int8 import QuantizedLinearInt8
from fxquant.modules.linear_intn import QuantizedLinearIntN
from fxquant.serialization.layers import class_name, known_classes
from fxquant.tracing.replacements import merge_attention_masks

FXQUANT_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    expect_constant,
    expect_shape,
    expect_values,
    named_result,
    dtype_limit,
    named_tuple,
    output_dict,
    grouped_matmul,
    strided_view,
    loop,
    merge_attention_masks,
    quantize_activation,
    dequantize_activation,
    rounded_vectors,
    attention,
    norm,
    add_and_norm,
    max_pool,
)
# They describe themselves.
DESCRIBED: dict[str, Any] = {
    class_name(cls): cls for cls in (QuantizedLinearInt4, QuantizedLinearInt8, QuantizedLinearIntN)
}
ALLOWED_KINDS = "functions on tensors of torch, operator, math or fxquant"


@functools.cache
def functions() -> dict[str, Callable[..., Any]]:
    """Every allowed function by its name."""
    own = {f"{function.__module__}.{function.__name__}": function for function in FXQUANT_FUNCTIONS}
    return {**saved_functions(), **own}


@functools.cache
def _names() -> dict[int, str]:
    return {id(function): name for name, function in reversed(functions().items())}


def function_name(function: Any, where: str, allowed: Iterable[str] = ()) -> str:
    """The name under which `function` is saved.

    Raises:
        SaveError: it is not on the allow-list.
    """
    if isinstance(function, torch._ops.OpOverload):
        name = f"{function._schema.name}.{function._schema.overload_name or 'default'}"
        if _aten(name) is function or name in set(allowed):
            return name
    elif id(function) in _names():
        return _names()[id(function)]
    else:
        name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__name__', function)}"
        if name in set(allowed):
            return name
    raise SaveError(
        where,
        found=f"the function {name}",
        needed=ALLOWED_KINDS,
        remedy=f"Make it importable and pass allow=({name!r},) to save_model and load_model.",
    )


def resolve_function(name: str, allowed: Iterable[str] = ()) -> Any:
    """The function saved as `name`.

    Raises:
        LoadError: it is not on the allow-list.
    """
    if name in functions():
        return functions()[name]
    overload = _aten(name)
    if overload is not None:
        return overload
    if name in set(allowed):
        return _import(name)
    close = near_misses(name, functions(), count=1)
    raise LoadError(
        f"function {name!r:.200}",
        found="a name that is not on the allow-list",
        needed=ALLOWED_KINDS,
        remedy=f"If you trust the file, pass allow=({name!r:.200},)."
        + (f" Nearest allowed: {close[0]}." if close else ""),
    )


def _aten(name: str) -> Any:
    space, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return saved_overload(packet, overload) if space == "aten" else None


def resolve_class(name: str, allowed: Iterable[type[nn.Module]] = ()) -> type[nn.Module]:
    """The module class saved as `name`.

    Raises:
        LoadError: it is neither torch.nn's nor fxquant's, nor among `allowed`.
    """
    known = {**known_classes(), **DESCRIBED, **{class_name(cls): cls for cls in allowed}}
    if name in known:
        return known[name]
    raise LoadError(
        f"module class {name!r:.200}",
        found="a class that is neither torch.nn's nor fxquant's",
        needed="a class the caller allows",
        remedy="If you trust the file, import the class and pass allow_modules=(TheClass,).",
    )


def check_method(name: str, error: type[SaveError] | type[LoadError]) -> None:
    """Raise `error` unless `name` is an allowed tensor method."""
    if name not in saved_methods():
        raise error(
            f"method {name!r:.200}",
            found="a method that is not on the allow-list",
            needed="a method of torch.Tensor without side effects",
            remedy="Rewrite this step of the model with a torch function.",
        )


def _import(name: str) -> Any:
    try:
        if "::" in name:
            space, _, rest = name.partition("::")
            packet, _, overload = rest.partition(".")
            return getattr(getattr(getattr(torch.ops, space), packet), overload)
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise LoadError(
            f"function {name!r}",
            found=f"that it cannot be imported: {error}",
            needed="an importable function",
            remedy="Install the package that defines it.",
        ) from error


def is_plain_function(value: Any) -> bool:
    """Whether `value` is a function rather than a module, a class or data."""
    return isinstance(value, FunctionType | type(len) | torch._ops.OpOverload)
