"""What a call must leave alone: the user's model, the data, and the process, bit for bit.

`with unchanged(model, *data): fxquant.quantize(model)` fails with one line for each difference,
also where the block raised.
"""

import collections
import functools
import gc
import inspect
import itertools
import os
import random
import signal
import types
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

MOST_LINES = 20
PLAIN = (type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.layout, range, slice)
CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)


class Same:
    """An object, equal to itself alone. It keeps the object alive: no address is used again."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self.value).__name__} at {id(self.value):#x}"


class Bits:
    """The values of a tensor at one moment, equal to the same bits (NaN too)."""

    def __init__(self, tensor: Tensor) -> None:
        with torch.no_grad():
            dense = tensor.detach()
            dense = dense.resolve_conj().resolve_neg() if dense.is_complex() else dense
            self.bits = dense.clone(memory_format=torch.contiguous_format).flatten()
            self.bits = self.bits.view(torch.uint8)
            self.size = tensor.element_size()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bits) and torch.equal(self.bits, other.bits)

    __hash__ = None  # type: ignore[assignment]

    def changed(self, other: "Bits") -> str:
        """How much of it is different in `other`."""
        if self.bits.shape != other.bits.shape:
            return "another size"
        differ = (self.bits != other.bits).view(-1, self.size).any(dim=1)
        return f"{int(differ.sum())} of {differ.numel()} values changed"


Fingerprint = dict[str, object]


def fingerprint(model: nn.Module, *data: object) -> Fingerprint:
    """Facts about `model`, `data` and the process by name; equal fingerprints mean no change."""
    facts: Fingerprint = dict(_process())
    with torch.no_grad():
        look = _Look(facts)
        look.at("model", model)
        for index, item in enumerate(data):
            look.at(f"data[{index}]", item)
    return facts


def differences(before: Fingerprint, after: Fingerprint) -> list[str]:
    """One line for each fact that is not the same."""
    lines: list[str] = []
    told: tuple[str, ...] = ()  # what is new or gone is told once, not with all that is in it
    for name in {**before, **after}:
        if name.startswith(told):
            continue
        if name not in after or name not in before:
            what = f"new, {_short(after[name])}" if name in after else "gone"
            lines.append(f"{name}: {what}")
            told += tuple(name + follows for follows in (" ", ".", "["))
        elif type(before[name]) is not type(after[name]) or before[name] != after[name]:
            old, new = before[name], after[name]
            if isinstance(old, Bits) and isinstance(new, Bits):
                lines.append(f"{name}: {old.changed(new)}")
            else:
                lines.append(f"{name}: {_short(old)} -> {_short(new)}")
    return lines


@contextmanager
def unchanged(model: nn.Module, *data: object) -> Iterator[None]:
    """Fail if the block, whether it returns or raises, changes `model`, `data` or the process."""
    before = fingerprint(model, *data)
    try:
        yield
    finally:
        lines = differences(before, fingerprint(model, *data))
        if lines:
            more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
            raise AssertionError("changed:\n  " + "\n  ".join(lines[:MOST_LINES] + more))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _process() -> Iterator[tuple[str, object]]:
    """The settings and random states of this process."""
    yield "torch's random state", Bits(torch.random.get_rng_state())
    yield "Python's random state", random.getstate()
    kind, keys, *rest = np.random.get_state()
    yield "numpy's random state", (kind, keys.tobytes(), *rest)
    yield "grad mode", torch.is_grad_enabled()
    yield "inference mode", torch.is_inference_mode_enabled()
    yield "default dtype", torch.get_default_dtype()
    yield "default device", torch.get_default_device()
    yield "threads", torch.get_num_threads()
    yield "fast path of attention", torch.backends.mha.get_fastpath_enabled()
    yield "autocast", (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    yield "autocast cache", torch.is_autocast_cache_enabled()
    yield "deterministic", torch.are_deterministic_algorithms_enabled()
    yield "deterministic warns", torch.is_deterministic_algorithms_warn_only_enabled()
    yield "fill uninitialized", torch.utils.deterministic.fill_uninitialized_memory
    yield "anomaly detection", torch.is_anomaly_enabled()
    yield "matmul precision", torch.get_float32_matmul_precision()
    yield "mkldnn", torch.backends.mkldnn.enabled
    flags = ("flash", "math", "mem_efficient", "cudnn")
    yield "attention kernels", [getattr(torch.backends.cuda, f"{f}_sdp_enabled")() for f in flags]
    yield "function modes", torch._C._len_torch_function_stack()
    yield "dispatch modes", torch._C._len_torch_dispatch_stack()
    for name in sorted(n for n in vars(module_globals) if n.startswith("_global_")):
        value = getattr(module_globals, name)
        yield f"torch.nn {name}", list(value.items()) if isinstance(value, dict) else value
    for name in ("linear", "dropout", "relu", "layer_norm", "multi_head_attention_forward"):
        yield f"functional.{name}", Same(getattr(nn.functional, name))
    yield "warnings filters", list(warnings.filters)
    yield "showwarning", Same(warnings.showwarning)
    yield "SIGINT", Same(signal.getsignal(signal.SIGINT))
    yield "environment", dict(os.environ)
    yield "garbage collection", (gc.isenabled(), gc.get_threshold())


class _Look:
    """A walk over a value that writes a fact for whatever can change."""

    def __init__(self, facts: Fingerprint) -> None:
        self.facts = facts
        self.seen: dict[int, str] = {}
        self.alive: list[object] = []
        self.classes: set[type] = set()

    def at(self, path: str, value: object) -> None:
        if isinstance(value, PLAIN):
            self.facts[path] = value
        elif isinstance(value, float | complex):
            self.facts[path] = repr(value)  # NaN is itself
        elif isinstance(value, CODE):
            self.facts[path] = Same(value)
        elif id(value) in self.seen:
            self.facts[path] = ("the same as", self.seen[id(value)])
        else:
            self.seen[id(value)] = path
            self.alive.append(value)
            self._object(path, value)

    def _object(self, path: str, value: Any) -> None:
        if isinstance(value, types.MethodType):  # made anew at each access
            self.facts[path] = (Same(value.__func__), Same(value.__self__))
            return
        self.facts[path] = Same(value)
        if isinstance(value, Tensor):
            self._tensor(path, value)
        elif isinstance(value, nn.Module):
            self._module(path, value)
        elif isinstance(value, Mapping):
            self._mapping(path, value)
        elif isinstance(value, list | tuple | collections.deque):
            self.facts[f"{path} length"] = len(value)
            for index, item in enumerate(value):
                self.at(f"{path}[{index}]", item)
        elif isinstance(value, set | frozenset):
            self.facts[f"{path} items"] = sorted(map(repr, value))
        else:
            self._other(path, value)

    def _tensor(self, path: str, value: Tensor) -> None:
        facts = self.facts
        facts[f"{path} class"] = Same(type(value))
        if nn.parameter.is_lazy(value):
            return
        facts[f"{path} kind"] = (value.dtype, value.device, value.layout, tuple(value.shape))
        facts[f"{path} autograd"] = (value.requires_grad, value.is_leaf, value.is_inference())
        facts[f"{path} tensor hooks"] = list((value._backward_hooks or {}).items())
        if value.layout == torch.strided and value.device.type != "meta":
            facts[f"{path} strides"] = (value.stride(), value.storage_offset())
            facts[f"{path} memory"] = value.untyped_storage().data_ptr()
            facts[f"{path} values"] = Bits(value)
        elif value.layout != torch.strided:
            facts[f"{path} values"] = Bits(value.detach().to_dense())
        if value.is_leaf or value.retains_grad:
            self.at(f"{path} gradient", value.grad)
        for name, attribute in getattr(value, "__dict__", {}).items():
            self.at(f"{path}.{name}", attribute)

    def _module(self, path: str, value: nn.Module) -> None:
        self.facts[f"{path} class"] = Same(type(value))
        for cls in type(value).__mro__[:-1]:
            self._class(cls)
        if isinstance(value, torch.jit.ScriptModule):
            self.facts[f"{path} training"] = value.training
            for name, tensor in (*value.named_parameters(), *value.named_buffers()):
                self.facts[f"{path}.{name} values"] = Bits(tensor)
            return
        if isinstance(value, torch.fx.GraphModule):
            self.facts[f"{path} code"] = value.code
        attributes = vars(value)
        self.facts[f"{path} attributes"] = list(attributes)
        for name, attribute in attributes.items():
            if name in ("_parameters", "_buffers", "_modules"):
                self.facts[f"{path} {name}"] = (Same(attribute), list(attribute))
                for key, item in attribute.items():
                    self.at(f"{path}.{key}", item)
            else:
                self.at(f"{path}.{name}", attribute)

    def _class(self, cls: type) -> None:
        """The methods of a class: what patches a class patches every instance."""
        if cls not in self.classes:
            self.classes.add(cls)
            names = {k: Same(v) for k, v in vars(cls).items() if not k.startswith(("__", "_abc_"))}
            for name in ("__call__", "__getattr__", "__setattr__"):
                names[name] = Same(vars(cls).get(name))
            self.facts[f"class {cls.__module__}.{cls.__qualname__} at {id(cls):#x}"] = names

    def _mapping(self, path: str, value: Mapping[Any, Any]) -> None:
        self.facts[f"{path} keys"] = [repr(key) for key in value]
        for key, item in value.items():
            self.at(f"{path}[{key!r}]", item)
        if type(value) not in (dict, collections.OrderedDict, collections.defaultdict):
            self._attributes(path, value)

    def _other(self, path: str, value: Any) -> None:
        """Objects that are no container: what is known of their state."""
        if isinstance(value, np.ndarray):
            self.facts[f"{path} values"] = (value.dtype.str, value.shape, value.tobytes())
        elif isinstance(value, torch.Generator):
            self.facts[f"{path} state"] = Bits(value.get_state())
        elif isinstance(value, random.Random):
            self.facts[f"{path} state"] = value.getstate()
        elif isinstance(value, np.random.Generator):
            self.facts[f"{path} state"] = repr(value.bit_generator.state)
        elif isinstance(value, types.GeneratorType):
            frame = value.gi_frame
            at = None if frame is None else frame.f_lasti
            self.facts[f"{path} state"] = (inspect.getgeneratorstate(value), at)
        elif isinstance(value, itertools.count):
            self.facts[f"{path} state"] = repr(value)
        elif isinstance(value, functools.partial):
            for name in ("func", "args", "keywords"):
                self.at(f"{path}.{name}", getattr(value, name))
        elif isinstance(value, weakref.ref):
            self.facts[f"{path} target"] = Same(value())
        else:
            self._attributes(path, value)

    def _attributes(self, path: str, value: object) -> None:
        """The attributes of an object of the user's; torch's and Python's own stay closed."""
        home = type(value).__module__.partition(".")[0]
        if home in ("torch", "builtins", "logging", "threading", "_thread", "typing", "re"):
            return
        if isinstance(value, torch.fx.Node | torch.fx.Graph):
            return
        attributes = dict(getattr(value, "__dict__", {}))
        for cls in type(value).__mro__:
            slots = vars(cls).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    attributes[name] = getattr(value, name)
        self.facts[f"{path} attributes"] = list(attributes)
        for name, attribute in attributes.items():
            self.at(f"{path}.{name}", attribute)
