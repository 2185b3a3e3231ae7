"""Several widths of one layer in a single run of what depends on it.

The outputs of the layer in each width are concatenated along the batch dimension, so that the nodes
after the layer run once for all widths. This saves time only where activations are small: there the
time of a run hardly depends on the number of rows. Above `BATCHED_BYTES` nothing is batched.

A graph may mix the rows of a batch, so this is checked twice. The float graph is run on repeated
inputs: each value must either repeat along its first dimension or not depend on the number of rows.
A mean over rows passes that check, so the first batched run through each node is also compared with
separate runs.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.graph.stepper import Stepper, held_bytes

BATCHED_BYTES = 1_000_000  # bytes of all activations; above, batching does not pay on a CPU


class RepeatedValues:
    """The float values of a run on inputs repeated `count` times.

    Attributes:
        values: by node.
        repeats: the nodes whose value repeats; the others are as in the single run.
    """

    def __init__(self, stepper: Stepper, values: dict[Node, Any], count: int) -> None:
        self.count = count
        self.values: dict[Node, Any] = {}
        self.repeats: set[Node] = set()
        wide = Stepper(stepper.gm, stepper.call.map(lambda t: repeat(t, count)))
        for node in wide.nodes:
            self.values[node] = wide.compute(node, self.values)
            if is_repeated(values[node], self.values[node], count):
                self.repeats.add(node)
            elif not _is_equal(values[node], self.values[node]):
                raise NotRepeatableError

    def part(self, node: Node, value: Any, index: int) -> Any:
        """What belongs to run `index` of a value of `node`."""
        if node not in self.repeats:
            return value
        return _map(value, lambda t: t.chunk(self.count)[index])


class NotRepeatableError(Exception):
    """Some value of the graph mixes rows, or has its rows elsewhere than in the first dimension."""


def repeated_values(stepper: Stepper, values: dict[Node, Any], count: int) -> RepeatedValues | None:
    """The values of a run on repeated inputs, or None where that does not pay or does not work."""
    if count < 2 or held_bytes(values.values()) * count > BATCHED_BYTES:
        return None
    try:
        return RepeatedValues(stepper, values, count)
    except Exception:  # whatever a graph raises on other rows: it is run the plain way
        return None


def compute_parts(
    stepper: Stepper,
    node: Node,
    values: dict[Node, Any],
    repeated: RepeatedValues,
    replacing: Sequence[Callable[[], Any]],
) -> Any:
    """The value of a node whose layer differs from run to run.

    Args:
        stepper: executes nodes.
        node: one that calls the layer.
        values: of the repeated run so far.
        repeated: tells which values repeat.
        replacing: a context for each run, in which the layer is the one of that run.

    Returns:
        The runs' results along the first dimension.
    """
    parts = []
    for index, context in enumerate(replacing):
        inputs = {n: repeated.part(n, values[n], index) for n in node.all_input_nodes}
        with context():
            parts.append(stepper.compute(node, inputs))
    return join(parts)


def is_same_error(reference: Tensor, plain: Iterable[Tensor], batched: Iterable[Tensor]) -> bool:
    """Whether batched runs deviate from the float output as plain runs do, to 1 %."""
    for one, two in zip(plain, batched, strict=True):
        limit = 0.01 * (one.float() - reference.float()).norm() + 1e-5 * reference.float().norm()
        if one.shape != two.shape or (two.float() - one.float()).norm() > limit:
            return False
    return True


def join(parts: Sequence[Any]) -> Any:
    """Equal structures of tensors into one, along the first dimension."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, tuple | list):
        return type(first)(join(group) for group in zip(*parts, strict=True))
    return first


def repeat(value: Any, count: int) -> Any:
    """A value with the rows of its tensors repeated."""
    return _map(value, lambda t: torch.cat([t] * count) if t.ndim else t)


def is_repeated(single: Any, wide: Any, count: int) -> bool:
    """Whether `wide` is `single` repeated along the first dimension."""
    return _is_equal(repeat(single, count), wide) and not _is_equal(single, wide)


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        same = isinstance(b, Tensor) and a.shape == b.shape
        return same and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_is_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_equal(a[k], b[k]) for k in a)
    return bool(a == b) or isinstance(a, int)  # a size may follow the rows


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_map(v, change) for v in value)
    if isinstance(value, dict):
        return type(value)({k: _map(v, change) for k, v in value.items()})
    return value
