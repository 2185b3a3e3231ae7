"""What a graph has to compute: what the user's own model computes.

The model itself is run, in evaluation mode, on the example and on other sizes that it takes; it and
the process are left as they were. Each candidate graph is run on the same calls under the same
random state, and its results are compared: values, structure and dtypes.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import ShapeError, TraceError
from fxquant.graph.calls import Call
from fxquant.graph.left_alone import evaluate, left_alone, process_left_alone
from fxquant.graph.structures import OutputDict, is_named_tuple, named_fields
from fxquant.tracing.products import ProductSpy
from fxquant.tracing.symbolic import describe_error
from fxquant.tracing.variations import LONG, ROWS, SHORT, Axis, free_axes

SEED = 20_000
PART = 1 << 20  # elements that are compared at once
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-8}
DEFAULT_TOLERANCE = 1e-3  # of the largest magnitude: fused ops round differently


@dataclass(frozen=True)
class Refusal:
    """A call that the model takes and a graph does not.

    Attributes:
        label: what is special about the call.
        reason: what the graph said.
        is_minor: whether neither a batch nor a length is refused.
    """

    label: str
    reason: str
    is_minor: bool


@dataclass(frozen=True)
class Verdict:
    """What became of a graph's comparison with the model.

    Attributes:
        wrong: why it is not usable, or None.
        refused: what it refuses although the model takes it.
        checked: on how many calls it agreed.
    """

    wrong: str | None
    refused: list[Refusal] = field(default_factory=list)
    checked: int = 0

    @property
    def is_perfect(self) -> bool:
        """Whether the graph does all that was tried."""
        return self.wrong is None and not self.refused


@dataclass(frozen=True)
class Answer:
    """A call and what the model returned; of the example, also of another call right after it.

    The second call has other values: whether the model keeps anything of the first shows there.
    """

    calls: tuple[Call, ...]
    label: str
    results: tuple[Any, ...]
    is_minor: bool = False

    @property
    def call(self) -> Call:
        """The first call."""
        return self.calls[0]


class Oracle:
    """The user's model on an example and its variations.

    Args:
        model: as the user gave it.
        example: one call's arguments.

    Raises:
        TraceError: the model does not run on the example.
    """

    def __init__(self, model: nn.Module, example: Call) -> None:
        self.model = model
        self.spy = ProductSpy(model)
        self.answers: list[Answer] = []
        self.called: set[nn.Module] = set()
        with process_left_alone():
            self.example = self._smallest(example)
            self.axes = free_axes(self.example, self._accepts)
            self._ask_at_other_sizes()

    def judge(self, gm: nn.Module) -> Verdict:
        """Compare a graph with the model on all calls."""
        refused: list[Refusal] = []
        checked = 0
        for answer in self.answers:
            wrong, refusal = self.compare(gm, answer)
            if refusal is not None and answer is not self.answers[0]:
                refused.append(Refusal(answer.label, refusal, answer.is_minor))
            elif wrong is not None or refusal is not None:
                where = "" if answer is self.answers[0] else f"at {answer.label}: "
                return Verdict(f"{where}{wrong or refusal}", refused, checked)
            else:
                checked += 1
        return Verdict(None, refused, checked)

    def compare(self, gm: nn.Module, answer: Answer) -> tuple[str | None, str | None]:
        """`(how the graph differs, why it refuses)`; both are None where it agrees."""
        try:
            found = run_alone(gm, answer.calls)
        except Exception as error:  # whatever the graph raises, it is not usable here
            if isinstance(error, ShapeError):
                return None, str(error)
            return None, f"the graph does not run: {describe_error(error)}"
        for expected, result in zip(answer.results, found, strict=True):
            wrong = difference(expected, result)
            if wrong is not None:
                return wrong, None
        return None, None

    def ask(self, call: Call, label: str) -> Answer | None:
        """The model's answer to a further call, or None where it does not take it."""
        with process_left_alone():
            results = self._run(call)
        return None if results is None else Answer((call,), label, results)

    def _smallest(self, example: Call) -> Call:
        """The example with few rows, where the model takes that; the answer to it is kept."""
        count = example.row_count
        small = example.rows(0, ROWS) if count > ROWS else example
        if small is not example and self._run(small) is None:
            small = example
        calls = (small, _other_values(small))
        results = self._run(*calls)
        if results is None:
            calls = (small, small)
            results = self._run(*calls, must_run=True)
        assert results is not None  # or it has raised
        self.answers.append(Answer(calls, "the example", results))
        return small

    def _ask_at_other_sizes(self) -> None:
        short = self.example
        for axis in self.axes:
            if axis.size > LONG and not axis.is_batch and not axis.is_minor:
                shorter = axis.resized(short, SHORT)
                short = shorter if self._accepts(shorter) else short
        for axis in self.axes:
            for size in axis.sizes():
                call = axis.resized(short, size)
                results = self._run(call)
                if results is not None:
                    label = describe_axis(axis, size)
                    self.answers.append(Answer((call,), label, results, axis.is_minor))
        if len(self.axes) > 1:  # two at once: one row of another length
            batch, other = self.axes[0], self.axes[1]
            size = max(1, min(other.size, LONG) // 2)
            call = other.resized(batch.resized(short, 1), size)
            results = self._run(call)
            if results is not None:
                label = f"one row and {describe_axis(other, size)}"
                self.answers.append(Answer((call,), label, results, other.is_minor))

    def _accepts(self, call: Call) -> bool:
        return self._run(call) is not None

    def _run(self, *calls: Call, must_run: bool = False) -> tuple[Any, ...] | None:
        try:
            with self._watching_calls():
                return run_alone(self.model, calls, spy=self.spy)
        except Exception as error:  # a user's forward may raise anything at all
            if must_run:
                raise TraceError(
                    f"{type(self.model).__name__}.forward",
                    found=f"that it raises on the example inputs: {describe_error(error)}",
                    needed="inputs the model runs on",
                    remedy="Check the shapes, dtypes and argument names of the example inputs.",
                ) from error
            return None

    @contextmanager
    def _watching_calls(self) -> Iterator[None]:
        handle = nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: self.called.add(module)
        )
        try:
            yield
        finally:
            handle.remove()


def describe_axis(axis: Axis, size: int) -> str:
    """What a size along an axis is called in messages."""
    if axis.is_batch:
        return f"batch size {size}"
    dimension = min(axis.places)[1]
    return f"length {size}" if dimension == 1 else f"size {size} of dimension {dimension}"


def run_alone(module: nn.Module, calls: Sequence[Call], *, spy: Any = None) -> tuple[Any, ...]:
    """What `module` returns, in evaluation mode and under a fixed seed; it is left as it was.

    Args:
        module: a model or a graph.
        calls: made one after the other: what the module keeps of one shows in the next.
        spy: a context that watches the run.
    """
    results = []
    with process_left_alone(), left_alone(module):
        evaluate(module)
        for call in calls:
            torch.manual_seed(SEED)
            with nullcontext() if spy is None else spy:
                results.append(_detached(call.run(module)))
    return tuple(results)


def _other_values(call: Call) -> Call:
    """A call of the same sizes with other values: rows in another order, floats smaller."""

    def change(tensor: Tensor) -> Tensor:
        flipped = tensor.flip(tuple(range(min(tensor.ndim, 2)))) if tensor.ndim else tensor
        return flipped * 0.5 if tensor.is_floating_point() else flipped

    return call.map(change)


def _detached(value: Any, depth: int = 0) -> Any:
    """The result with tensors of its own: what a model returns it may change later."""
    if isinstance(value, Tensor):
        return value.detach().clone() if value.layout is torch.strided else value.detach()
    if depth > 32:
        return value
    if is_named_tuple(value):
        return type(value)(*(_detached(v, depth + 1) for v in value))
    if type(value) in (list, tuple):
        return type(value)(_detached(v, depth + 1) for v in value)
    fields = named_fields(value)
    if fields is not None:
        return _Fields({k: _detached(v, depth + 1) for k, v in fields.items()})
    if isinstance(value, Mapping):
        return {k: _detached(v, depth + 1) for k, v in value.items()}
    return value


class _Fields(dict[str, Any]):
    """The fields of a model's output class."""


def difference(expected: Any, found: Any, where: str = "output") -> str | None:
    """How two results differ, or None.

    A dict stands for any class of named outputs, and may lack what a graph cannot hold (objects
    that are no data) and what is None.
    """
    if isinstance(expected, Tensor):
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


def _tensor_difference(expected: Tensor, found: Any, where: str) -> str | None:
    if not isinstance(found, Tensor):
        return f"{where} is a {type(found).__name__} instead of a tensor"
    if expected.shape != found.shape:
        return f"{where} has shape {list(found.shape)} instead of {list(expected.shape)}"
    if expected.dtype != found.dtype:
        return f"{where} is {found.dtype} instead of {expected.dtype}"
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
