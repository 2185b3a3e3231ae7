"""A call of a model without its arithmetic: which layers read what, and how many bytes are alive.

The model's own code runs on torch's fake tensors, which have a shape and no values, so that a
rehearsal of any size takes neither memory nor time. Code that asks for values (a loop over how many
tokens an expert has) needs real ones: then the call runs for real, if the model has its weights.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fxquant.graph.calls import Call
from fxquant.graph.layers import layer_arguments
from fxquant.graph.left_alone import left_alone, process_left_alone
from fxquant.modules.weight_forms import chosen_form


@dataclass
class Reading:
    """Layers that read one value, at the first of them.

    Attributes:
        layers: their names, in order.
        alive: bytes of the values that exist there, the one that is read among them.
        tokens: how many vectors of inputs their weights multiply.
    """

    layers: list[str]
    alive: int
    tokens: int = 0


@dataclass
class Rehearsal:
    """What a call of a model holds and does.

    Attributes:
        rows: of the call.
        given: bytes of its tensors.
        first: bytes of the first of them.
        readings: in the order in which layers are called for the first time.
        layers_peak: the most bytes of values that are alive at once, up to the last layer.
        peak: the same up to the end.
        largest: elements of the largest value.
        layers_flops: floating-point operations of products, up to the last layer.
        flops: the same up to the end.
        reached: what the module that the run went up to is called with.
    """

    rows: int
    given: int = 0
    first: int = 0
    readings: list[Reading] = field(default_factory=list)
    layers_peak: int = 0
    peak: int = 0
    largest: int = 0
    layers_flops: int = 0
    flops: int = 0
    reached: Call | None = None


class _Reached(BaseException):
    """Ends a run; no `except Exception` of a model's own code stops it."""


def rehearse(
    model: nn.Module, call: Call, layers: Mapping[str, nn.Module], until: str | None = None
) -> Rehearsal | None:
    """Let a model run a call without arithmetic.

    Args:
        model: of any class, or a graph. Its parameters may be on meta.
        call: of the model.
        layers: modules of the model to look at, by the names that they get in the result.
        until: the path of a module; the run ends where it is called, and its arguments are kept.

    Returns:
        None where the model cannot run so, and has no weights to run with.
    """
    with process_left_alone(), left_alone(model):
        try:
            return _run(model, call, layers, until, is_fake=True)
        except Exception:  # code that needs values, in whatever way it says so
            if any(p.is_meta for p in model.parameters()):
                return None
            return _run(model, call, layers, until, is_fake=False)


def _run(
    model: nn.Module,
    call: Call,
    layers: Mapping[str, nn.Module],
    until: str | None,
    *,
    is_fake: bool,
) -> Rehearsal:
    fake = FakeTensorMode(allow_non_fake_inputs=True) if is_fake else None
    own = call.clone() if fake is None else call.map(partial(_faked, fake))
    state = dict(_state_of(model))
    made: dict[str, Tensor] = {}
    if fake is not None:  # tied tensors stay one
        by_tensor = {id(t): _faked(fake, t) for t in state.values()}
        made = {name: by_tensor[id(t)] for name, t in state.items()}
    found, watch = Rehearsal(rows=call.row_count), _LiveBytes((made or state).values())
    with ExitStack() as inside:
        inside.enter_context(torch.no_grad())
        inside.enter_context(fake or nullcontext())
        _watch_layers(inside, layers, watch, found)
        if until is not None:
            _stop_at(inside, model.get_submodule(until), found)
        inside.enter_context(watch)
        for tensor in own.tensors():
            watch.see(tensor)
        found.given, found.first = watch.alive, next((t.nbytes for t in own.tensors()), 0)
        with suppress(_Reached):
            torch.func.functional_call(model, made, own.args, own.kwargs)
    found.peak, found.largest, found.flops = watch.peak, watch.largest, watch.flops
    return found


def _state_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers; one that is tied has several names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _faked(fake: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A tensor on the CPU of the same shape, without values."""
    with fake:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the values that operations make, while these are alive.

    Args:
        owned: tensors that do not count: the model's own.

    Attributes:
        alive: bytes that are alive now.
        peak: the most there ever were.
        largest: elements of the largest value.
        flops: floating-point operations of the products so far.
    """

    def __init__(self, owned: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = self.largest = self.flops = 0
        self._owned = list(owned)  # kept alive: memory that is freed gets its address again
        self._seen = {_memory(tensor) for tensor in self._owned}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and see what it makes."""
        made = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=made)
        for leaf in pytree.tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self.see(leaf)
        return made

    def see(self, tensor: Tensor) -> None:
        """Count a value until its memory is freed; views of one memory count once."""
        memory = _memory(tensor)
        if memory in self._seen:
            return
        self.largest = max(self.largest, tensor.numel())
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._seen.add(memory)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, memory, size)

    def _forget(self, memory: int, size: int) -> None:
        self._seen.discard(memory)
        self.alive -= size


def _memory(tensor: Tensor) -> int:
    """What tells one memory from another; fake ones have no address."""
    return tensor.untyped_storage()._cdata


def _watch_layers(
    inside: ExitStack, layers: Mapping[str, nn.Module], watch: _LiveBytes, found: Rehearsal
) -> None:
    """Note what layers read when they are called for the first time."""
    reading_of: dict[str, Reading] = {}
    by_value: dict[tuple[int, int], tuple[Any, Reading]] = {}  # of a memory and its version

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = layer_arguments(args, kwargs)[0]
        if name in reading_of:
            return
        storage, value = x.untyped_storage(), (_memory(x), x._version)
        known = by_value.get(value)
        if known is None or known[0]() is not storage:  # its address may be another one's now
            known = weakref.ref(storage), Reading([], watch.alive)
            by_value[value] = known
            found.readings.append(known[1])
        known[1].layers.append(name)
        reading_of[name] = known[1]

    def after(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        found.layers_peak, found.layers_flops = watch.peak, watch.flops
        reading = reading_of[name]
        reading.tokens = max(reading.tokens, output.numel() // _outputs_a_token(module))

    for name, module in layers.items():
        pre = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
        inside.callback(pre.remove)
        inside.callback(module.register_forward_hook(partial(after, name)).remove)


def _outputs_a_token(module: nn.Module) -> int:
    """How many numbers a layer gives for each vector that its weight multiplies."""
    form = chosen_form(module)
    rows = len(form.matrix(module))
    return rows if form.gives is not None else rows // form.blocks(module)


def _stop_at(inside: ExitStack, module: nn.Module, found: Rehearsal) -> None:
    """Keep what a module is called with, and end the run there."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.reached = Call(args, kwargs)
        raise _Reached

    inside.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
