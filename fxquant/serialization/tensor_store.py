"""Tensors by name. The same memory is stored once; a transposed tensor stays transposed."""

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import LoadError, SaveError


class TensorWriter:
    """Collects tensors for a file and hands out references to them."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._kept: list[Tensor] = []  # alive, so that no address is used twice

    def reference(self, tensor: Tensor, name: str) -> dict[str, Any]:
        """Store `tensor` under `name`, unless its memory is stored already.

        Raises:
            SaveError: it has no values in memory of its own: it is on meta, or sparse.
        """
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise SaveError(
                name,
                found="a tensor on meta" if tensor.is_meta else f"a tensor of {tensor.layout}",
                needed="a dense tensor with values",
                remedy="Load the values first, or make it dense with to_dense().",
            )
        order = _memory_order(tensor)
        dense = tensor.detach()
        dense = dense.permute(order) if order else dense.contiguous()
        source = tensor if order else dense
        key: tuple[Any, ...] = (source.data_ptr(), tensor.dtype, tuple(dense.shape), tensor.device)
        if not tensor.numel():
            key = (name,)
        if key not in self._names:
            while name in self.tensors:  # another tensor may have the same path
                name += "_"
            self._names[key] = name
            self.tensors[name] = _own_memory(dense)
            self._kept.append(source)
        reference: dict[str, Any] = {"tensor": self._names[key]}
        if order and list(order) != sorted(order):
            reference["order"] = list(order)
        if tensor.is_complex():
            reference["complex"] = True
        if isinstance(tensor, nn.Parameter):
            reference["parameter"] = tensor.requires_grad
        return reference


class TensorReader:
    """Gives back tensors by reference; equal references are the same object."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._made: dict[str, Tensor] = {}
        self._used: set[str] = set()

    def tensor(self, reference: Any) -> Tensor:
        """The tensor or parameter of a reference.

        Raises:
            LoadError: the reference does not fit the file.
        """
        key = repr(reference)
        if key not in self._made:
            self._made[key] = self._make(reference)
        return self._made[key]

    def check_all_used(self) -> None:
        """Raise a `LoadError` if the file has a tensor that nothing refers to."""
        unused = sorted(set(self._tensors) - self._used)
        if unused:
            raise _unfit(f"a tensor {unused[0]!r} that nothing uses")

    def _make(self, reference: dict[str, Any]) -> Tensor:
        tensor = self._tensors.get(reference["tensor"])
        if tensor is None:
            raise _unfit(f"a reference {reference!r:.200} to a tensor that is not in the file")
        self._used.add(reference["tensor"])
        if reference.get("complex"):
            if not tensor.is_floating_point() or tensor.shape[-1:] != (2,):
                raise _unfit(f"complex numbers in {tensor.dtype} {list(tensor.shape)}")
            tensor = torch.view_as_complex(tensor)
        order = reference.get("order")
        if order is not None:
            if sorted(order) != list(range(tensor.ndim)):
                raise _unfit(f"the order {order!r:.80} of {tensor.ndim} dimensions")
            tensor = tensor.permute([order.index(d) for d in range(len(order))])
        if "parameter" in reference:
            needs_gradient = reference["parameter"]
            if needs_gradient and not (tensor.is_floating_point() or tensor.is_complex()):
                raise _unfit(f"a gradient of {tensor.dtype}")
            return nn.Parameter(tensor, requires_grad=needs_gradient)
        return tensor


def _unfit(found: str) -> LoadError:
    return LoadError(
        "saved tensor",
        found=found,
        needed="references that fit the tensors in the file",
        remedy="The file is damaged: save the model again.",
    )


def _memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The order of dimensions in which `tensor` is contiguous, or None if there is none."""
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.ndim), key=lambda d: (-strides[d], d)))
    return order if tensor.permute(order).is_contiguous() else None


def _own_memory(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    tensor = tensor.contiguous()
    is_whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_whole else tensor.clone()
