"""A graph counts only if it computes what the model computes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxquant.graph.structures import tensors_in
from fxquant.tracing.signature import ExampleInputs, clone
from fxquant.tracing.symbolic import describe_error

TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-8}
DEFAULT_TOLERANCE = 1e-3  # of the largest magnitude: fused ops round differently


def mismatch(gm: GraphModule | nn.Module, module: nn.Module, inputs: ExampleInputs) -> str | None:
    """Why `gm` does not compute what `module` computes, or None.

    Both are run on the example inputs, and on the example inputs repeated twice along the first
    (batch) and then along the second (length) dimension where the model takes that.
    """
    reason = _compare(gm, module, inputs)
    for dimension, meaning in enumerate(("batch size", "length")):
        if reason is not None:
            return reason
        doubled = ExampleInputs(_double(inputs.args, dimension), _double(inputs.kwargs, dimension))
        try:
            _run(module, doubled)
        except Exception:  # the model has a fixed size there: nothing to compare
            continue
        reason = _compare(gm, module, doubled)
        if reason is not None:
            reason = f"at another {meaning}: {reason}"
    return reason


def _compare(gm: nn.Module, module: nn.Module, inputs: ExampleInputs) -> str | None:
    expected = list(tensors_in(_run(module, inputs)))
    try:
        found = list(tensors_in(_run(gm, inputs)))
    except Exception as error:  # whatever the graph raises, it is not usable
        return f"the graph does not run: {describe_error(error)}"
    if not found:
        return "the graph returns no tensor"
    by_shape = iter(expected)
    for tensor in found:  # the graph may leave out outputs, but keeps their order
        if not any(_is_close(tensor, other) for other in by_shape):
            return "the graph computes other values than the model"
    return None


def _is_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite):
        return False
    limit = TOLERANCE.get(a.dtype, DEFAULT_TOLERANCE)
    a, b = a[finite].double(), b[finite].double()
    return not b.numel() or bool((a - b).abs().max() <= limit * b.abs().max().clamp(min=1e-6))


def _run(module: nn.Module, inputs: ExampleInputs) -> Any:
    with torch.no_grad():
        return module(*clone(inputs.args), **clone(inputs.kwargs))


def _double(values: Any, dimension: int) -> Any:
    def double(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim <= dimension:
            return value
        return torch.cat((value, value), dim=dimension)

    return pytree.tree_map(double, values)
