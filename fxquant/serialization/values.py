"""Arguments of nodes and attributes of modules as tagged JSON, and back."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from fxquant.errors import LoadError, SaveError
from fxquant.serialization.allowlist import function_name, is_plain_function, resolve_function

DTYPES = {
    str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)
}
LAYOUTS = {"strided": torch.strided}
MEMORY_FORMATS = {
    name: getattr(torch, name)
    for name in ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")
}
MAX_DEPTH = 64


def encode(value: Any, where: str, allowed: tuple[str, ...] = ()) -> Any:
    """`value` as JSON data.

    Raises:
        SaveError: it has a type that cannot be described.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case complex():
            return {"complex": [encode(value.real, where), encode(value.imag, where)]}
        case Node():
            return {"node": value.name}
        case torch.Size():
            return {"size": list(value)}
        case tuple():
            return {"tuple": [encode(v, where, allowed) for v in value]}
        case list():
            return [encode(v, where, allowed) for v in value]
        case Mapping():
            pairs = value.items()
            return {"dict": [[encode(k, where), encode(v, where, allowed)] for k, v in pairs]}
        case slice():
            parts = (value.start, value.stop, value.step)
            return {"slice": [encode(v, where, allowed) for v in parts]}
        case range():
            return {"range": [value.start, value.stop, value.step]}
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": str(value)}
        case torch.layout():
            return {"layout": str(value).removeprefix("torch.")}
        case torch.memory_format():
            return {"memory_format": str(value).removeprefix("torch.")}
    if value is Ellipsis:
        return {"ellipsis": True}
    if is_plain_function(value):
        return {"function": function_name(value, where, allowed)}
    raise SaveError(
        where,
        found=f"a value of type {type(value).__module__}.{type(value).__qualname__}",
        needed="numbers, text, tensors, containers, dtypes or allowed functions",
        remedy="Compute it outside the model, or register it as a buffer or a plain attribute.",
    )


class LeftOut:
    """An attribute of an opaque module that could not be saved: reading from it is an error."""

    def __init__(self, what: str) -> None:
        self.__what = what

    def __getattr__(self, name: str) -> Any:
        raise LoadError(
            self.__what,
            found=f"that the module's code reads {name!r} of it",
            needed="an attribute that was saved",
            remedy="Let the module keep the number or text it needs as an attribute of its own.",
        )


def decode(
    data: Any, nodes: Mapping[str, Node], allowed: tuple[str, ...] = (), depth: int = 0
) -> Any:
    """The value of JSON data.

    Args:
        data: what `encode` made.
        nodes: the nodes made so far, by name.
        allowed: further function names the caller trusts.
        depth: how deep the value is nested.

    Raises:
        LoadError: the data has an unknown form.
    """
    if depth > MAX_DEPTH:
        raise _malformed("a value nested too deeply")
    if data is None or isinstance(data, bool | int | float | str):
        return data

    def inner(part: Any) -> Any:
        return decode(part, nodes, allowed, depth + 1)

    if isinstance(data, list):
        return [inner(part) for part in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise _malformed(repr(data)[:80])
    tag, content = next(iter(data.items()))
    match tag:
        case "node" if isinstance(content, str) and content in nodes:
            return nodes[content]
        case "tuple":
            return tuple(inner(part) for part in content)
        case "dict":
            return {inner(key): inner(part) for key, part in content}
        case "slice":
            return slice(*map(inner, content))
        case "range":
            return range(*map(int, content))
        case "size":
            return torch.Size(content)
        case "float":
            return float(content)
        case "complex":
            return complex(*map(inner, content))
        case "dtype":
            return DTYPES[content]
        case "device":
            return torch.device(content)
        case "layout":
            return LAYOUTS[content]
        case "memory_format":
            return MEMORY_FORMATS[content]
        case "ellipsis":
            return ...
        case "left_out":
            return LeftOut(str(content))
        case "function":
            return resolve_function(content, allowed)
    raise _malformed(repr(data)[:80])


def _malformed(found: str) -> LoadError:
    return LoadError(
        "saved graph",
        found=found,
        needed="a value that fxquant wrote",
        remedy="The file is damaged or was not written by fxquant: save the model again.",
    )
