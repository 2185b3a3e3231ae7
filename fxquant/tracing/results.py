"""What a model returned: as much of it as is kept, and how two results differ.

A language model returns a number for each token and each word of its vocabulary. Of a tensor with
more than `MOST_KEPT` elements an even part is kept: every n-th element, n being coprime to all of
its sizes, so that the elements come from all places along every dimension.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.graph.structures import OutputDict, is_named_tuple, named_fields

MOST_KEPT = 1 << 22  # elements of a tensor: 17 MB of float32
PART = 1 << 20  # elements that are compared at once
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-8}
DEFAULT_TOLERANCE = 1e-3  # of the largest magnitude: fused ops round differently


@dataclass(frozen=True, eq=False)
class ThinnedTensor:
    """Every n-th element of a tensor that is too large to keep.

    Attributes:
        shape: of the tensor.
        values: the elements that are kept, [at most `MOST_KEPT`].
    """

    shape: torch.Size
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "ThinnedTensor":
        """What is kept of `tensor`."""
        step = -(-tensor.numel() // MOST_KEPT)
        while any(math.gcd(step, size) > 1 for size in tensor.shape):
            step += 1
        return cls(tensor.shape, tensor.detach().reshape(-1)[::step].clone())

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's."""
        return self.values.dtype


def kept(value: Any, depth: int = 0) -> Any:
    """The result with tensors of its own: what a model returns it may change later."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return value.detach()
        return value.detach().clone() if value.numel() <= MOST_KEPT else ThinnedTensor.of(value)
    if depth > 32:
        return value
    if is_named_tuple(value):
        return type(value)(*(kept(v, depth + 1) for v in value))
    if type(value) in (list, tuple):
        return type(value)(kept(v, depth + 1) for v in value)
    fields = named_fields(value)
    if fields is not None:
        return _Fields({k: kept(v, depth + 1) for k, v in fields.items()})
    if isinstance(value, Mapping):
        return {k: kept(v, depth + 1) for k, v in value.items()}
    return value


class _Fields(dict[str, Any]):
    """The fields of a model's output class."""


def difference(expected: Any, found: Any, where: str = "output") -> str | None:
    """How two results differ, or None.

    A dict stands for any class of named outputs, and may lack what a graph cannot hold (objects
    that are no data) and what is None.
    """
    if isinstance(expected, Tensor | ThinnedTensor):
        return _tensor_difference(expected, found, where)
    if isinstance(expected, _Fields):
        if isinstance(found, OutputDict | _Fields):
            return _dict_difference(expected, found, where)
        return f"{where} is a {type(found).__name__} instead of named outputs"
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            return f"{where} is a {type(found).__name__} instead of a dict"
        return _dict_difference(expected, found, where)
    if isinstance(expected, list | tuple):
        kept = [v for v in expected if not _is_object(v)]
        same_kind = isinstance(found, tuple) == isinstance(expected, tuple)
        if not isinstance(found, list | tuple) or not same_kind or len(kept) != len(found):
            return f"{where} has another structure than the model's"
        if getattr(expected, "_fields", None) != getattr(found, "_fields", None):
            return f"{where} lacks the names of the model's named tuple"
        for i, (one, other) in enumerate(zip(kept, found, strict=True)):
            wrong = difference(one, other, f"{where}[{i}]")
            if wrong is not None:
                return wrong
        return None
    if _is_object(expected):
        return None
    same = type(expected) is type(found) and (expected == found or expected != expected)
    return None if same else f"{where} is {found!r} instead of {expected!r}"


def _dict_difference(expected: Any, found: Any, where: str) -> str | None:
    kept = {k: v for k, v in expected.items() if not _is_object(v)}
    found = {k: v for k, v in found.items() if not _is_object(v)}  # an opaque child hands it on
    if isinstance(expected, _Fields):
        kept = {k: v for k, v in kept.items() if v is not None}
        found = {k: v for k, v in found.items() if v is not None}
    if list(kept) != list(found):
        return f"{where} has the keys {list(found)} instead of {list(kept)}"
    for key, value in kept.items():
        wrong = difference(value, found[key], f"{where}.{key}")
        if wrong is not None:
            return wrong
    return None


def _is_object(value: Any) -> bool:
    """Whether a graph cannot hold `value`: a cache, a distribution, any object that is no data."""
    plain = (Tensor, Mapping, list, tuple, bool, int, float, str, type(None))
    return not isinstance(value, plain) and not dataclasses.is_dataclass(value)


def _tensor_difference(expected: Tensor | ThinnedTensor, found: Any, where: str) -> str | None:
    if not isinstance(found, Tensor | ThinnedTensor):
        return f"{where} is a {type(found).__name__} instead of a tensor"
    if expected.shape != found.shape:
        return f"{where} has shape {list(found.shape)} instead of {list(expected.shape)}"
    if expected.dtype != found.dtype:
        return f"{where} is {found.dtype} instead of {expected.dtype}"
    if isinstance(expected, ThinnedTensor) and isinstance(found, ThinnedTensor):
        return _value_difference(expected.values, found.values, where)
    if isinstance(expected, ThinnedTensor) or isinstance(found, ThinnedTensor):
        return f"{where} has another layout than the model's"
    return _value_difference(expected, found, where)


def _value_difference(expected: Tensor, found: Tensor, where: str) -> str | None:
    if expected.layout is not torch.strided or expected.is_meta or not expected.numel():
        return None
    if expected.is_complex():
        expected, found = torch.view_as_real(expected), torch.view_as_real(found)
    if not expected.is_floating_point():
        same = torch.equal(expected, found)
        return None if same else f"{where}: the graph computes other values than the model"
    wanted, given = expected.reshape(-1), found.reshape(-1)
    finite = [p[torch.isfinite(p)].abs().amax(0, keepdim=True) for p in wanted.split(PART)
              if torch.isfinite(p).any()]  # fmt: skip
    largest = float(torch.cat(finite).max()) if finite else 0.0
    limit = TOLERANCE.get(expected.dtype, DEFAULT_TOLERANCE) * max(largest, 1e-6)
    for one, other in zip(wanted.split(PART), given.split(PART), strict=True):
        is_finite = torch.isfinite(one)
        same_rest = torch.equal(is_finite, torch.isfinite(other)) and torch.equal(
            one[~is_finite].nan_to_num(nan=0.0), other[~is_finite].nan_to_num(nan=0.0)
        )
        gap = (one[is_finite].double() - other[is_finite].double()).abs()
        if not same_rest or bool((gap > limit).any()):
            return f"{where}: the graph computes other values than the model"
    return None
