"""Tensors by name. The same memory is stored once; a transposed tensor stays transposed."""

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import LoadError


class TensorWriter:
    """Collects tensors for a file and hands out references to them."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._kept: list[Tensor] = []  # alive, so that no address is used twice

    def reference(self, tensor: Tensor, name: str) -> dict[str, Any]:
        """Store `tensor` under `name`, unless its memory is stored already."""
        order = _memory_order(tensor)
        dense = tensor.detach()
        dense = dense.permute(order) if order else dense.contiguous()
        source = tensor if order else dense
        key: tuple[Any, ...] = (source.data_ptr(), tensor.dtype, tuple(dense.shape), tensor.device)
        if not tensor.numel():
            key = (name,)
        if key not in self._names:
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

    def tensor(self, reference: Any) -> Tensor:
        """The tensor or parameter of a reference.

        Raises:
            LoadError: the reference does not fit the file.
        """
        key = repr(reference)
        if key not in self._made:
            self._made[key] = self._make(reference)
        return self._made[key]

    def _make(self, reference: Any) -> Tensor:
        if not isinstance(reference, dict) or reference.get("tensor") not in self._tensors:
            raise LoadError(
                "saved tensor",
                found=f"a reference {reference!r} to a tensor that is not in the file",
                needed="references to stored tensors",
                remedy="The file is damaged: save the model again.",
            )
        tensor = self._tensors[reference["tensor"]]
        if reference.get("complex"):
            tensor = torch.view_as_complex(tensor)
        order = reference.get("order")
        if order is not None:
            tensor = tensor.permute([order.index(d) for d in range(len(order))])
        if "parameter" in reference:
            return nn.Parameter(tensor, requires_grad=bool(reference["parameter"]))
        return tensor


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
