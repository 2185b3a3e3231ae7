"""Changes of a file. What a change of the description would hide behind its digest is signed again.

An attacker can sign, so most files here are signed: they test what comes after the digest.
"""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fxquant.graph.saved_ops import saved_functions, saved_methods
from fxquant.numerics.digest import digest_of
from fxquant.serialization.container import DTYPE_NAMES
from fxquant.serialization.files import metadata_of

NUMBERS = (0, 1, -1, 2, 3, 7, 16, 255, -128, 1 << 15, (1 << 31) - 1, 1 << 31, -(1 << 63), 1 << 64,
           0.5, -0.0, 1e30, 1e400, float("nan"))  # fmt: skip
TEXTS = ("", "x", "a.b", "__class__", "forward", "_compiled_call_impl", "weight", "é", "meta",
         "torch.load", "os.system", "builtins.exec", "{0.__class__}", "def",
         "x" * 200_000)  # fmt: skip
_NAMED = [getattr(torch.ops.aten, name) for name in dir(torch.ops.aten)]
_PACKETS = [op for op in _NAMED if isinstance(op, torch._ops.OpOverloadPacket)]
ATEN = [f"aten::{op.__name__}.{overload}" for op in _PACKETS for overload in op.overloads()]
TORCH = [f"torch.{name}" for name in dir(torch) if callable(getattr(torch, name))]
DTYPES = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16,
          torch.float32, torch.float64, torch.bool]  # fmt: skip

Content = tuple[dict[str, Any], dict[str, Tensor]]


def mutated(content: Content, rng: random.Random) -> bytes:
    """The bytes of a mutated file."""
    description, tensors = json.loads(json.dumps(content[0])), dict(content[1])
    kind = rng.random()
    if kind < 0.1:
        return damaged_bytes(bytearray(written(description, tensors)), rng)
    if kind < 0.13:
        return damaged_header(written(description, tensors), rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choices((change_tensors, change_description, change_argument), (2, 4, 4))[0]
        change(description, tensors, rng)
    return written(description, tensors, sign=rng.random() < 0.97)


def written(description: dict[str, Any], tensors: dict[str, Tensor], sign: bool = True) -> bytes:
    """The file, with new digests if it is signed."""
    if sign and isinstance(description.get("digests"), dict):
        description["digests"] = {
            name: digest_of(name, DTYPE_NAMES[t.dtype], t) for name, t in tensors.items()
        }
    return save({k: t.contiguous().clone() for k, t in tensors.items()}, metadata_of(description))


def damaged_bytes(data: bytearray, rng: random.Random) -> bytes:
    """Flipped bits, a cut, or bytes more."""
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        place = rng.randrange(len(data) + 1)
        return bytes(data[:place]) + rng.randbytes(rng.randrange(1, 20)) + bytes(data[place:])
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def damaged_header(data: bytes, rng: random.Random) -> bytes:
    """A header of another form around the same tensors."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    _change_somewhere(header, rng, [])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def change_tensors(
    description: dict[str, Any], tensors: dict[str, Tensor], rng: random.Random
) -> None:
    """Another dtype, shape, place, name or other values of a tensor."""
    if not tensors:
        return
    name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    tensor = tensors[name]
    match rng.randrange(8):
        case 0:
            tensors[name], tensors[other] = tensors[other], tensor
        case 1:
            tensors[name] = tensor.to(rng.choice(DTYPES))
        case 2 if tensor.ndim and tensor.shape[0]:
            tensors[name] = tensor[: rng.randrange(tensor.shape[0])]
        case 3:
            tensors[name] = tensor.reshape(-1)
        case 4:
            tensors[name] = tensor.T if tensor.ndim == 2 else tensor[None]
        case 5:
            del tensors[name]
        case 6:
            tensors[name + "x"] = tensor
        case _ if tensor.numel() and tensor.dtype != torch.bool:
            values = tensor.clone().reshape(-1)
            value = rng.choice((0, 1, 127, float("nan"), float("inf"), -1, 1e30))
            is_float = tensor.is_floating_point()
            whole = int(value) % 128 if value == value and abs(value) < 1e20 else 3
            values[rng.randrange(len(values))] = value if is_float else whole
            tensors[name] = values.reshape(tensor.shape)


def change_description(
    description: dict[str, Any], tensors: dict[str, Tensor], rng: random.Random
) -> None:
    """Another op, argument, field, number, name, or order."""
    graph = description.get("graph")
    nodes = graph.get("nodes") if isinstance(graph, dict) else None
    nodes = nodes if isinstance(nodes, list) else []
    if rng.random() < 0.35 and nodes:
        _change_call(rng.choice(nodes), rng)
        return
    part = rng.choice(("graph", "modules", "modules", "graph", "all", "info", "fingerprint"))
    _change_somewhere(description if part == "all" else description.get(part), rng, nodes)


def change_argument(
    description: dict[str, Any], tensors: dict[str, Tensor], rng: random.Random
) -> None:
    """Another number, dtype or value in a call or a constructor; most of these files load."""
    try:
        if rng.random() < 0.7:
            data = rng.choice(description["graph"]["nodes"])
            data = data[rng.choice(("args", "kwargs"))]
        else:
            data = rng.choice(description["modules"])
            data = data.get("arguments", data.get("description"))
    except (KeyError, TypeError, IndexError, AttributeError):
        return  # an earlier change took it away
    leaves = list(_leaves(data))
    if not leaves:
        return
    holder, key = rng.choice(leaves)
    value = holder[key]
    if isinstance(value, bool):
        holder[key] = not value
    elif key == "node" and isinstance(value, int):
        holder[key] = rng.randrange(value + 1)
    elif isinstance(value, int | float):
        holder[key] = rng.choice((0, 1, -1, 2, 3, 5, value * 2, -value, 100, 0.5, None))
    elif key == "dtype":
        holder[key] = rng.choice(("int64", "float16", "bool", "uint8", "complex64", "quint8"))
    elif isinstance(value, str):
        holder[key] = rng.choice(("mean", "reflect", "tanh", "shape", "dtype", "T", "data", "x"))
    else:
        holder[key] = rng.choice((0, 1, True, 0.5, {"node": 0}, {"tuple": [1, 1]}, [0, 1]))


def _leaves(data: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(data, dict | list):
        return
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        if isinstance(value, dict | list) and value:
            yield from _leaves(value)
        else:
            yield data, key


def _change_call(node: Any, rng: random.Random) -> None:
    """Let a node call something else."""
    if not isinstance(node, dict) or node.get("op") in ("placeholder", "output"):
        return
    names = rng.choice((ATEN, TORCH, sorted(saved_functions()), sorted(saved_functions())))
    if rng.random() < 0.3:
        node["op"], node["target"] = "call_method", rng.choice(sorted(saved_methods()))
    else:
        node["op"], node["target"] = "call_function", rng.choice(names)
    if rng.random() < 0.3 and isinstance(node.get("args"), dict):
        arguments = node["args"].get("tuple")
        if not isinstance(arguments, list):
            return
        arguments.append(rng.choice((*NUMBERS[:12], [1, 2], {"tuple": [0, 1]}, None, True,
                                     {"dtype": "int64"}, {"node": 0})))  # fmt: skip


def _change_somewhere(data: Any, rng: random.Random, nodes: list[Any]) -> None:
    """Change a place that is drawn by walking down."""
    holder = data
    while True:
        if not isinstance(holder, dict | list) or not holder:
            return
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        value = holder[key]
        if isinstance(value, dict | list) and value and rng.random() < 0.9:
            holder = value
            continue
        break
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(value))
        case 1:
            holder[rng.choice(TEXTS[:-1])] = copy.deepcopy(value)
        case 2 if isinstance(holder, list) and len(holder) > 1:
            rng.shuffle(holder)
        case 3:
            holder[key] = _nested(value, rng.choice((1, 3, 70, 200)))
        case 4:
            holder[key] = rng.choice(TEXTS)
        case 5 if nodes:
            other = rng.choice(nodes)
            holder[key] = copy.deepcopy(rng.choice((other, other.get("args") if isinstance(
                other, dict) else None, {"node": rng.randrange(len(nodes))})))  # fmt: skip
        case _ if isinstance(value, bool):
            holder[key] = not value
        case _ if isinstance(value, int | float):
            near = value + rng.choice((-1, 1)) if abs(value) < 1e15 else 0
            holder[key] = rng.choice((*NUMBERS, near, near, near))
        case _:
            holder[key] = rng.choice((None, True, [], {}, *NUMBERS))


def _nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value] if depth % 2 else {"tuple": [value]}
    return value
