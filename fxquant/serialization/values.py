"""Arguments of nodes and of constructors as tagged JSON, and back."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from fxquant.errors import LoadError, SaveError
from fxquant.serialization.allowlist import function_name, is_plain_function, resolve_function

# No quantized and no sub-byte ones: not every op checks that it was given one.
_DTYPE_NAMES = """float32 float64 float16 bfloat16 float8_e4m3fn float8_e5m2 complex64 complex128
int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool"""
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES.split()}
LAYOUTS = {"strided": torch.strided}
MEMORY_FORMATS = {
    name: getattr(torch, name)
    for name in ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")
}
MAX_DEPTH = 64
MOST_CHARACTERS = 100_000
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|mtia)(:[0-9]{1,3})?")


def encode(
    value: Any,
    where: str,
    allowed: tuple[str, ...] = (),
    nodes: Mapping[Node, int] | None = None,
) -> Any:
    """`value` as JSON data; a node is its number in `nodes`.

    Raises:
        SaveError: it has a type that cannot be described.
    """

    def inner(part: Any) -> Any:
        return encode(part, where, allowed, nodes)

    match value:
        case None | bool():
            return value
        case int():
            return int(value)
        case str():
            return "".join(value)  # the text itself, whatever a subclass prints
        case float():
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        case complex():
            return {"complex": [inner(value.real), inner(value.imag)]}
        case Node() if nodes is not None:
            return {"node": nodes[value]}
        case torch.Size():
            return {"size": list(value)}
        case tuple():
            return {"tuple": [inner(v) for v in value]}
        case list():
            return [inner(v) for v in value]
        case Mapping():
            return {"dict": [[inner(k), inner(v)] for k, v in value.items()]}
        case slice():
            parts = (value.start, value.stop, value.step)
            return {"slice": [inner(v) for v in parts]}
        case range():
            return {"range": [value.start, value.stop, value.step]}
        case torch.dtype() if value in DTYPES.values():
            return {"dtype": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": str(value)}
        case torch.layout() if value in LAYOUTS.values():
            return {"layout": str(value).removeprefix("torch.")}
        case torch.memory_format():
            return {"memory_format": str(value).removeprefix("torch.")}
    if value is Ellipsis:
        return {"ellipsis": True}
    if is_plain_function(value):  # only what the caller allows: no op takes a function
        name = function_name(value, where, allowed)
        if name in allowed:
            return {"function": name}
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
    data: Any,
    nodes: Sequence[Node] = (),
    allowed: tuple[str, ...] = (),
    device: torch.device | None = None,
    depth: int = 0,
) -> Any:
    """The value of JSON data.

    Args:
        data: what `encode` made.
        nodes: the nodes made so far.
        allowed: further function names the caller trusts.
        device: what each device in the data becomes; None leaves them.
        depth: how deep the value is nested.

    Raises:
        LoadError: the data has an unknown form.
    """
    if depth > MAX_DEPTH:
        raise _malformed("a value nested too deeply")
    if isinstance(data, str) and len(data) > MOST_CHARACTERS:
        raise _malformed("a very long text")
    if data is None or isinstance(data, bool | int | float | str):
        return data

    def inner(part: Any) -> Any:
        return decode(part, nodes, allowed, device, depth + 1)

    def whole(part: Any) -> int:
        if type(part) is not int:
            raise _malformed(repr(data)[:80])
        return part

    if isinstance(data, list):
        return [inner(part) for part in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise _malformed(repr(data)[:80])
    tag, content = next(iter(data.items()))
    try:
        match tag:
            case "node" if 0 <= whole(content) < len(nodes):
                return nodes[content]
            case "tuple" if isinstance(content, list):
                return tuple(inner(part) for part in content)
            case "dict" if isinstance(content, list):
                return {_key(inner(key)): inner(part) for key, part in content}
            case "slice" if isinstance(content, list) and len(content) == 3:
                return slice(*map(inner, content))
            case "range" if isinstance(content, list) and len(content) == 3:
                return range(*map(whole, content))
            case "size" if isinstance(content, list):
                return torch.Size(map(whole, content))
            case "float" if content in ("inf", "-inf", "nan"):
                return float(content)
            case "complex" if isinstance(content, list) and len(content) == 2:
                return complex(*map(inner, content))
            case "dtype":
                return DTYPES[content]
            case "device" if isinstance(content, str) and _DEVICE.fullmatch(content):
                return torch.device(content) if device is None else device
            case "layout":
                return LAYOUTS[content]
            case "memory_format":
                return MEMORY_FORMATS[content]
            case "ellipsis":
                return ...
            case "function" if content in allowed:
                return resolve_function(content, allowed)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise _malformed(f"{data!r:.80} ({error})") from error
    raise _malformed(repr(data)[:80])


def _key(key: Any) -> Any:
    if not isinstance(key, str | int | float | bool | None):
        raise _malformed(f"the key {key!r:.80}")
    return key


def _malformed(found: str) -> LoadError:
    return LoadError(
        "saved graph",
        found=found,
        needed="a value that fxquant wrote",
        remedy="The file is damaged or was not written by fxquant: save the model again.",
    )
