"""Run a model and leave it, and the process, bit for bit as they were.

A forward may write into parameters (an embedding with `max_norm`), buffers, its own attributes and
the lists and objects behind them; `eval()` may merge adapters into weights. What is written is put
back on the way out, also after an error or an interrupt.
"""

import os
import random
import types
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant.graph.effects import module_writes, writes
from fxquant.modules.linear import QuantizedLinear

DEPTH = 6  # of containers and objects behind a module's attributes
_UNDECLARED = ("running_mean", "running_var")  # norms write them; no schema says so
LARGEST_CONTAINER = 10_000  # entries; a longer list is data, not a module's state
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)
_CODE = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)


@contextmanager
def process_left_alone() -> Iterator[None]:
    """Put back the random state, settings of torch, the environment and the filters of warnings.

    The first call in a process imports much of torch, which leaves its own in the last two.
    """
    environment = dict(os.environ)
    rng, own = torch.get_rng_state(), random.getstate()
    numpy_state = numpy.random.get_state()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    grad = torch.is_grad_enabled()
    try:
        with warnings.catch_warnings(), torch.inference_mode(False):
            torch.set_grad_enabled(grad)
            yield
    finally:
        torch.set_rng_state(rng)
        random.setstate(own)
        numpy.random.set_state(numpy_state)
        torch.set_grad_enabled(grad)
        torch.backends.mha.set_fastpath_enabled(fastpath)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update((n, v) for n, v in environment.items() if os.environ.get(n) != v)


@contextmanager
def structure_left_alone(model: nn.Module) -> Iterator[None]:
    """Attributes, hooks and containers of `model` are put back; its memory is not watched."""
    state = _State(model)
    try:
        yield
    finally:
        state.put_back()


def evaluate(model: nn.Module) -> None:
    """Put `model` into evaluation mode, by its own code; exported programs are in it for good."""
    with suppress(NotImplementedError):
        model.eval()


@contextmanager
def left_alone(*models: nn.Module) -> Iterator["WrittenMemory"]:
    """Whatever happens to the models and their tensors inside is undone at the end.

    Yields:
        The memory that was written so far: what shares it must take a copy to keep it.
    """
    # One for all: each op inside goes through every mode that is entered.
    memory = WrittenMemory(tensor for model in models for tensor in _tensors_of(model))
    with ExitStack() as undo:
        for model in models:
            undo.callback(_State(model).put_back)
        undo.callback(memory.put_back)
        with memory if memory.is_watching else nullcontext():
            yield memory


@contextmanager
def graph_left_alone(gm: nn.Module) -> Iterator[None]:
    """Undo what runs of a graph leave in its modules and in parameters and buffers that it writes.

    What observers have seen stays, and so do layers that are put in place of others.
    """
    with ExitStack() as undo:
        if isinstance(gm, GraphModule):
            undo.enter_context(left_alone(*_writing_modules(gm)))
            undo.enter_context(attributes_left_alone(gm))
        yield


@contextmanager
def attributes_left_alone(gm: GraphModule) -> Iterator[None]:
    """Undo what the ops of a graph write into its parameters and buffers."""
    memory = WrittenMemory(_written_attributes(gm))
    with ExitStack() as undo:
        if memory.is_watching:
            undo.callback(memory.put_back)
            undo.enter_context(memory)
        yield


def written_tensors(gm: GraphModule) -> Iterator[Tensor]:
    """The tensors that runs of a graph may write into: those that are then put back."""
    yield from _written_attributes(gm)
    for module in _writing_modules(gm):
        yield from _tensors_of(module)


def _writing_modules(gm: GraphModule) -> Iterator[nn.Module]:
    """The modules that a graph calls and that write in place, each once."""
    called = (n.target for n in gm.graph.nodes if n.op == "call_module")
    modules = dict.fromkeys(gm.get_submodule(str(target)) for target in called)
    return filter(module_writes, modules)


def _written_attributes(gm: GraphModule) -> Iterator[Tensor]:
    """The tensors that a graph reads from itself, where one of its ops writes."""
    if not any(writes(node) for node in gm.graph.nodes):
        return
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value = getattr(gm.get_submodule(owner), name)
            if isinstance(value, Tensor):
                yield value


class WrittenMemory(TorchDispatchMode):
    """Saves the memory of tensors at the moment when an op is about to write into it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = {s._cdata: s for s in map(_storage, tensors) if s is not None}
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    @property
    def is_watching(self) -> bool:
        """Whether there is any memory to save."""
        return bool(self._own)

    def is_written(self, tensor: Tensor) -> bool:
        """Whether an op wrote into the memory of `tensor`."""
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self._saved

    def put_back(self) -> None:
        """Undo what was written."""
        for storage, saved in self._saved.values():
            storage.copy_(saved)
        self._saved.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None:
            for position, argument in enumerate(schema.arguments):
                info = argument.alias_info
                is_written = info is not None and info.is_write
                if is_written or argument.name in _UNDECLARED:
                    given = args[position] if position < len(args) else kwargs.get(argument.name)
                    self._save(given)
        return func(*args, **kwargs)

    def _save(self, value: Any) -> None:
        for tensor in value if isinstance(value, list | tuple) else (value,):
            storage = _storage(tensor) if isinstance(tensor, Tensor) else None
            key = 0 if storage is None else storage._cdata
            if key in self._own and key not in self._saved:
                self._saved[key] = self._own[key], self._own[key].clone()


class _State:
    """The classes, attributes and containers of all modules, and where parameters lie."""

    def __init__(self, model: nn.Module) -> None:
        self._entries: list[tuple[Any, Any, Any]] = []
        self._data: list[tuple[Tensor, Tensor, bool]] = []
        self._seen: set[int] = set()
        for module in model.modules():
            self._note(module, 0)

    def put_back(self) -> None:
        """Undo changes of attributes, containers and of tensors' `.data`."""
        for owner, kind, contents in reversed(self._entries):
            if kind == "object":
                own, attributes = contents
                if type(owner) is not own:
                    owner.__class__ = own
                _restore(vars(owner), attributes)
            elif kind == "dict":
                _restore(owner, contents)
            elif kind == "list":
                if len(owner) != len(contents) or any(
                    a is not b for a, b in zip(owner, contents, strict=True)
                ):
                    owner[:] = contents
            elif kind == "set" and owner != contents:
                owner.clear()
                owner.update(contents)
            elif kind == "deque" and list(owner) != contents:
                owner.clear()
                owner.extend(contents)
            elif kind == "generator" and not torch.equal(owner.get_state(), contents):
                owner.set_state(contents)
            elif kind == "slots":
                for name, former in contents.items():
                    if getattr(owner, name, None) is not former:
                        setattr(owner, name, former)
            elif kind == "script" and owner.training != contents:
                owner.training = contents
        for tensor, data, requires_grad in self._data:
            if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
                tensor.data = data
            if tensor.requires_grad != requires_grad and tensor.is_leaf:
                tensor.requires_grad_(requires_grad)

    def _note(self, value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            depth = 0  # however deep a module lies, all of its own attributes are noted
        if isinstance(value, (*_PLAIN, *_CODE)) or id(value) in self._seen or depth > DEPTH:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            if isinstance(value, nn.Parameter):
                self._data.append((value, value.detach(), value.requires_grad))
        elif isinstance(value, dict):
            self._entries.append((value, "dict", dict(value)))
            self._note_all(value.values(), len(value), depth)
        elif isinstance(value, list):
            self._entries.append((value, "list", list(value)))
            self._note_all(value, len(value), depth)
        elif isinstance(value, set):
            self._entries.append((value, "set", set(value)))
        elif isinstance(value, deque):
            self._entries.append((value, "deque", list(value)))
            self._note_all(value, len(value), depth)
        elif isinstance(value, torch.Generator):
            self._entries.append((value, "generator", value.get_state()))
        elif isinstance(value, torch.jit.ScriptModule):
            self._entries.append((value, "script", value.training))
        elif isinstance(value, tuple):
            self._note_all(value, len(value), depth)
        elif not isinstance(getattr(value, "__dict__", None), dict):
            slots = {
                name: getattr(value, name)
                for own in type(value).__mro__
                for name in _slots_of(own)
                if hasattr(value, name)
            }
            if slots:
                self._entries.append((value, "slots", slots))
                self._note_all(slots.values(), len(slots), depth)
        else:
            attributes = vars(value)
            self._entries.append((value, "object", (type(value), dict(attributes))))
            self._note_all(attributes.values(), len(attributes), depth)

    def _note_all(self, values: Any, count: int, depth: int) -> None:
        if count <= LARGEST_CONTAINER:
            for value in list(values):
                self._note(value, depth + 1)


def _slots_of(own: type) -> tuple[str, ...]:
    if own.__module__ in ("builtins", "torch") or own.__module__.startswith("torch."):
        return ()
    slots = vars(own).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _restore(owner: dict[Any, Any], contents: dict[Any, Any]) -> None:
    """Give a dict the entries it had, in their order; untouched where nothing changed."""
    same = len(owner) == len(contents) and all(
        a is b and x is y for (a, x), (b, y) in zip(owner.items(), contents.items(), strict=True)
    )
    if not same:
        owner.clear()
        owner.update(contents)


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """The memory of a tensor; None for kinds that have none of their own."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return None
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a wrapper around other tensors
        return None


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors in attributes, lists and objects behind modules."""
    seen: set[int] = set()
    open_values: list[tuple[Any, int]] = [
        (vars(m), 0) for m in model.modules() if not isinstance(m, QuantizedLinear)
    ]
    while open_values:
        value, depth = open_values.pop()
        if isinstance(value, (*_PLAIN, *_CODE)) or id(value) in seen or depth > DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
            continue
        parts: Any = ()
        if isinstance(value, dict):
            parts = value.values()
        elif isinstance(value, list | tuple | set):
            parts = value
        elif not isinstance(value, nn.Module) and isinstance(
            getattr(value, "__dict__", None), dict
        ):
            parts = vars(value).values()
        if len(parts) <= LARGEST_CONTAINER:
            open_values += [(part, depth + 1) for part in list(parts)]
