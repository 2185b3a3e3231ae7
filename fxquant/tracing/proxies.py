"""Proxies that behave like the values they stand for while a forward is traced symbolically."""

import builtins
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.fx import Proxy
from torch.utils import _pytree as pytree

from fxquant.graph.structures import DTYPE_LIMITS, dtype_limit


def has_wrapped_functions() -> bool:
    """Whether a library marked functions with `torch.fx.wrap`."""
    return bool(_wrapped_by_libraries())


def _wrapped_by_libraries() -> list[Any]:
    wrapped = torch.fx._symbolic_trace._wrapped_fns_to_patch
    return [k for k, space in wrapped.items()
            if not str(space.get("__name__", "")).startswith("torch.")]  # fmt: skip


@contextmanager
def traceable(see_through: bool) -> Iterator[None]:
    """Without the fast path of attention and, if asked, without opaque functions of libraries."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    wrapped = torch.fx._symbolic_trace._wrapped_fns_to_patch
    kept = dict(wrapped)
    if see_through:
        for key in _wrapped_by_libraries():
            del wrapped[key]
    try:
        with torch.no_grad(), _proxies_are_tensors(), _factories_are_recorded():
            yield
    finally:
        wrapped.clear()
        wrapped.update(kept)
        torch.backends.mha.set_fastpath_enabled(fastpath)


class TensorProxy(Proxy):
    """A value that is a tensor: statements that write into it are recorded as such."""

    def __getattr__(self, name: str) -> Any:
        """Refuse what a parameter does not have, so that `hasattr` answers as it would."""
        if self.node.op == "get_attr" and not hasattr(Tensor, name):
            raise AttributeError(f"a tensor has no attribute {name!r}")
        return super().__getattr__(name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _record_in_place(name: str) -> Any:
    function = getattr(operator, name)

    def record(self: Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior",
              "ixor", "imatmul"):  # fmt: skip
    # `h += 1` changes what every other name of the tensor sees; without this, `h = h + 1` is traced
    setattr(TensorProxy, f"__{_name}__", _record_in_place(_name))


class NumberProxy(Proxy):
    """A value that is a size, a dtype or another number, not a tensor."""


def _isinstance_of_proxies(kind: Any, value: Any, classes: Any) -> bool:
    """`isinstance` for a forward that is traced: a proxy of a tensor is a tensor.

    A class of proxies that says so itself would crash torch, whose C++ code would take it for one.
    """
    if kind(value, classes):
        return True
    if type(value) is not TensorProxy:
        return False
    wanted = classes if type(classes) is tuple else (classes,)
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return Tensor in wanted and not caller.startswith(("torch.", "fxquant."))


@contextmanager
def _proxies_are_tensors() -> Iterator[None]:
    kind = builtins.isinstance
    builtins.isinstance = lambda value, classes: _isinstance_of_proxies(kind, value, classes)
    try:
        yield
    finally:
        builtins.isinstance = kind


# Functions that torch does not ask a proxy about: `torch.ones(batch, length)` has no tensor among
# its arguments.
_FACTORIES = (
    "ones", "zeros", "empty", "full", "arange", "linspace", "eye", "rand", "randn", "randint",
)  # fmt: skip


@contextmanager
def _factories_are_recorded() -> Iterator[None]:
    """A call of a factory with a proxy among its arguments becomes a node."""
    kept = {name: getattr(torch, name) for name in (*_FACTORIES, "finfo", "iinfo")}
    for name in _FACTORIES:
        setattr(torch, name, _recorded(kept[name]))
    for name in ("finfo", "iinfo"):
        setattr(torch, name, _limits(kept[name]))
    try:
        yield
    finally:
        for name, factory in kept.items():
            setattr(torch, name, factory)


def record_attributes(*arguments: Any) -> None:
    """Record the attributes among the arguments of a call: `x.indices` waits for its first use."""
    for proxy in _proxies_in(arguments):
        proxy.node  # noqa: B018


def _proxies_in(arguments: Any) -> Iterator[Any]:
    """The proxies in the arguments of a call, at any depth."""
    # Not `isinstance`, which is patched while a forward is traced.
    return (leaf for leaf in pytree.tree_leaves(arguments) if Proxy in type(leaf).__mro__)


def _recorded(factory: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        proxy = next(_proxies_in((args, kwargs)), None)
        # A generator of the model's own has a state, which a graph cannot hold: torch refuses it.
        if proxy is None or kwargs.get("generator") is not None:
            return factory(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", factory, args, kwargs)

    return call


class _Limits:
    """What `torch.finfo` and `torch.iinfo` tell of a dtype that is known when the graph runs."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        if name not in DTYPE_LIMITS:
            raise AttributeError(f"a graph does not know {name!r} of a dtype")
        return dtype_limit(self._dtype, name)


def _limits(original: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        dtype = next(_proxies_in((args, kwargs)), None)
        return original(*args, **kwargs) if dtype is None else _Limits(dtype)

    return call
