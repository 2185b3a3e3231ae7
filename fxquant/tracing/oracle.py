"""What a graph has to compute: what the user's own model computes.

The model itself is run, in evaluation mode, on the example and on other sizes that it takes; it and
the process are left as they were. Each candidate graph is run on the same calls under the same
random state, and its results are compared: values, structure and dtypes.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import ShapeError, TraceError
from fxquant.graph.calls import Call
from fxquant.graph.left_alone import evaluate, left_alone, process_left_alone
from fxquant.tracing.capture import describe_error
from fxquant.tracing.products import ProductSpy
from fxquant.tracing.results import difference, kept
from fxquant.tracing.variations import COMPARED_ROWS, LONG, SHORT, Axis, free_axes, is_large

SEED = 20_000


@dataclass(frozen=True)
class Refusal:
    """A call that the model takes and a graph does not.

    Attributes:
        label: what is special about the call.
        reason: what the graph said.
        axis: along which the call differs from the example.
        call: its arguments.
    """

    label: str
    reason: str
    axis: Axis
    call: Call

    @property
    def is_minor(self) -> bool:
        """Whether neither a batch nor a length is refused."""
        return self.axis.is_minor

    @property
    def is_batch(self) -> bool:
        """Whether it is for its number of rows that the call is refused."""
        return self.axis.is_batch


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
    axis: Axis | None = None  # along which the call differs from the example
    longer: Call | None = None  # the call at the example's own lengths, where it is a shorter one

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
        TraceError: the model does not run on the example, or a tensor of it is not dense.
    """

    def __init__(self, model: nn.Module, example: Call) -> None:
        example.check_dense(f"{type(model).__name__}.forward", TraceError)
        self.model = model
        self.spy = ProductSpy(model)
        self.answers: list[Answer] = []
        self.called: set[nn.Module] = set()
        self._tried: dict[tuple[torch.Size, ...], tuple[Call, tuple[Any, ...] | None]] = {}
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
            if refusal is not None and answer.longer is not None:
                # is it the other size that is refused, or only the shorter length?
                again = self.ask(answer.longer, answer.label)
                wrong, refusal = (wrong, refusal) if again is None else self.compare(gm, again)
            if refusal is not None and answer.axis is not None:
                refused.append(Refusal(answer.label, refusal, answer.axis, answer.call))
            elif wrong is not None or refusal is not None:
                where = "" if answer is self.answers[0] else f"at {answer.label}: "
                return Verdict(f"{where}{wrong or refusal}", refused, checked)
            else:
                checked += 1
        return Verdict(None, refused, checked)

    def compare(self, gm: nn.Module, answer: Answer) -> tuple[str | None, str | None]:
        """`(how the graph differs, why it refuses)`; both are None where it agrees."""
        try:
            with redirect_stderr(io.StringIO()):  # torch.fx prints the line of a graph that fails
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
        is_large = example.row_count > COMPARED_ROWS
        small = example.rows(0, COMPARED_ROWS) if is_large else example
        for call in dict.fromkeys((small, example)):
            for calls in ((call, _other_values(call)), (call, call)):
                must_run = call is example and calls[1] is call
                results = self._run(*calls, must_run=must_run)
                if results is not None:
                    self.answers.append(Answer(calls, "the example", results))
                    return call
        raise AssertionError("a call that must run has raised")

    def _ask_at_other_sizes(self) -> None:
        short = self.example
        for axis in self.axes:
            if axis.is_long:
                shorter = axis.resized(short, SHORT)
                short = shorter if self._accepts(shorter) else short
        if is_large(self.example) and self.axes and self.axes[0].is_batch:
            one = self.axes[0].resized(short, 1)
            short = one if self._accepts(one) else short
        for axis in self.axes:
            for size in axis.sizes(is_large=is_large(self.example)):
                call, results = self._tried_before(axis.resized(short, size))
                if results is not None:
                    label = describe_axis(axis, size)
                    longer = axis.resized(self.example, size) if short is not self.example else None
                    self.answers.append(Answer((call,), label, results, axis, longer))
        if len(self.axes) > 1:  # two at once: one row of another length
            batch, other = self.axes[0], self.axes[1]
            size = max(1, min(other.size, LONG) // 2)
            call, results = self._tried_before(other.resized(batch.resized(short, 1), size))
            if results is not None:
                label = f"one row and {describe_axis(other, size)}"
                self.answers.append(Answer((call,), label, results, other))

    def _accepts(self, call: Call) -> bool:
        return self._tried_before(call)[1] is not None

    def _tried_before(self, call: Call) -> tuple[Call, tuple[Any, ...] | None]:
        """A call of the same sizes that was made, or this one, and what the model returned."""
        sizes = tuple(tensor.shape for tensor in call.tensors())
        if sizes not in self._tried:
            self._tried[sizes] = (call, self._run(call))
        return self._tried[sizes]

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
    is_length = dimension == 1 and not axis.is_minor
    return f"length {size}" if is_length else f"size {size} of dimension {dimension}"


def run_alone(module: nn.Module, calls: Sequence[Call], *, spy: Any = None) -> tuple[Any, ...]:
    """What is kept of what `module` returns, in evaluation mode and under a fixed seed.

    The module is left as it was; one result at a time is whole (see `results.py`).

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
                results.append(kept(call.run(module)))
    return tuple(results)


def _other_values(call: Call) -> Call:
    """A call of the same sizes with other values: rows in another order, floats smaller."""

    def change(tensor: Tensor) -> Tensor:
        flipped = tensor.flip(tuple(range(min(tensor.ndim, 2)))) if tensor.ndim else tensor
        return flipped * 0.5 if tensor.is_floating_point() else flipped

    return call.map(change)
