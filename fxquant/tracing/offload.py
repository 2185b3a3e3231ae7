"""A model whose weights accelerate brings in for each call, as one that has them.

`cpu_offload`, `disk_offload` and a `device_map` with `"disk"` put tensors on the meta device, and a
hook around the forward of their module that knows where the values are (`weights_map`). Tracing,
fitting and measuring need the values, so they are taken from there into a copy without hooks. Those
that wait in memory are shared with it; those on a disk are read. Nothing here imports accelerate.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from fxquant.config.memory import free_bytes
from fxquant.errors import OptionError
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.tracing.prepare import unwrap

REMEDY = (
    "Quantize its folder with fxquant.quantize_checkpoint(source, target), which reads one block "
    "after another; or load all of the model onto the CPU, without offload."
)


def loaded(model: nn.Module) -> nn.Module:
    """The user's own model, or a copy with the values of what accelerate has offloaded.

    Args:
        model: in wrappers or not (see `unwrap`); it is not changed. Parameters on the meta device
            without a hook that knows their values stay there.

    Raises:
        OptionError: it is no Python module; or some tensors are offloaded, and the others are not
            all on the CPU, or there is not enough memory for what is on the disk.
    """
    model = unwrap(model)
    hooked = {name: m for name, m in model.named_modules() if _maps_of(m)}
    offloaded = [(name, key) for name, m in hooked.items() for key in _empty_names(m)]
    if not offloaded:
        return model
    _check_place(model)
    _check_room(hooked, offloaded)
    with _without_hooks(model):
        made = copy_sharing_tensors(model)
    parameters: dict[tuple[Any, ...], nn.Parameter] = {}  # by memory: tied tensors stay one
    for name, key in offloaded:
        value = _value(hooked[name], key)
        module = made.get_submodule(name)
        if key in module._buffers:
            module._buffers[key] = value
            continue
        former = module._parameters[key]
        place = value.untyped_storage().data_ptr(), value.storage_offset(), value.shape
        module._parameters[key] = parameters.setdefault(
            place, nn.Parameter(value, requires_grad=former is not None and former.requires_grad)
        )
    tie = getattr(made, "tie_weights", None)
    if callable(tie):  # a disk has tied tensors twice
        tie()
    return made


def _maps_of(module: nn.Module) -> list[Mapping[str, Tensor]]:
    """Where accelerate's hooks on a module find the values of its tensors."""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    maps = [getattr(one, "weights_map", None) for one in hooks]
    return [found for found in maps if found is not None]


def _empty_names(module: nn.Module) -> list[str]:
    tensors = (*module._parameters.items(), *module._buffers.items())
    return [key for key, tensor in tensors if tensor is not None and tensor.is_meta]


def _value(module: nn.Module, key: str) -> Tensor:
    for values in _maps_of(module):
        if key in values:
            return values[key].detach()
    raise OptionError(
        "model",
        found=f"{key!r} of a {type(module).__name__} on the meta device, which its offload hook "
        "does not know",
        needed="values of all tensors",
        remedy=REMEDY,
    )


def _check_place(model: nn.Module) -> None:
    others = {t.device.type for t in (*model.parameters(), *model.buffers())} - {"cpu", "meta"}
    if others:
        raise OptionError(
            "model",
            found=f"offloaded tensors beside tensors on {', '.join(sorted(others))}",
            needed="all of the model on one device",
            remedy=REMEDY,
        )


def _check_room(hooked: Mapping[str, nn.Module], offloaded: list[tuple[str, str]]) -> None:
    read = 0
    for name, key in offloaded:
        module = hooked[name]
        if not all(isinstance(getattr(m, "dataset", m), dict) for m in _maps_of(module)):
            tensor = module._parameters.get(key)
            read += (module._buffers[key] if tensor is None else tensor).nbytes  # type: ignore[union-attr]
    free = free_bytes()
    if free is not None and read > free:
        raise OptionError(
            "model",
            found=f"{read / 1e9:.1f} GB of offloaded weights on a disk, and {free / 1e9:.1f} GB of "
            "free memory",
            needed="a model that fits into memory",
            remedy=REMEDY,
        )


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Inside, each module has the forward that accelerate found, and no hook."""
    with ExitStack() as undo:
        for module in model.modules():
            own = vars(module)
            if "_hf_hook" not in own or "_old_forward" not in own:
                continue
            kept = {key: own.pop(key) for key in ("_hf_hook", "_old_forward", "forward")}
            undo.callback(own.update, kept)
            old = kept["_old_forward"]
            if getattr(old, "__func__", None) is not type(module).forward:
                own["forward"] = old  # it was set on the instance before
        yield
