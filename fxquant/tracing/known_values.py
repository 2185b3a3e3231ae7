"""An export that knows the values of its example: checks by value, each written into the graph.

`if mask.any(): raise ...` cannot be exported, since of an exported tensor nothing but sizes is
known. With the example's values beside the sizes it goes the way of the example, and
`torch.export` asserts in the graph that the answer is the same in every call. Another input is
refused in plain words.

before (from `torch.export`): `_assert_scalar(eq, "Runtime assertion failed for expression ...")`
after: `expect_values(eq, "line 764 of masking_utils.py", "if mask.any():")`

What is right for all inputs is taken: a check whose other way raises, and a question whose answer
depends on sizes and weights alone. Where the other way computes something else, a graph of one way
refuses inputs that the model takes; which checks it needs is tried (`value_checks.py`).
"""

import operator
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config
from torch._subclasses import FakeTensorMode, meta_utils
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from fxquant.graph.effects import is_random
from fxquant.graph.ops import op_name
from fxquant.graph.structures import expect_values
from fxquant.tracing.branches import Place, only_raises, user_place

aten = torch.ops.aten
ASSERTION = aten._assert_scalar.default
BRANCH = "fxquant_branch"  # node.meta of a check: the place where another answer goes another way
_DECIDED = "propagate_real_tensors"  # how torch calls an answer that it took from the values
_SYMBOL = re.compile(r"\b[a-z]+\d+\b")  # a number whose value is not known: u0, zuf1
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "isin", "sub", "rsub")
_LINE = re.compile(r'File "(.+)", line (\d+), in .*\n\s*(.*)')


class KnownValues:
    """Lets an export know the values of its example, and notes the branches that they decide.

    Attributes:
        branches, compared: see `fault`.
    """

    def __init__(self) -> None:
        self._decisions: list[tuple[Collection[Any], Place, bool]] = []
        self.branches: list[str] = []
        self.compared: list[int] = []

    @contextmanager
    def known(self) -> Iterator[None]:
        """Exports inside know the values."""
        compare = FakeTensorMode._maybe_infer_fake_kernel_from_pytree_out
        defer = ShapeEnv.guard_or_defer_runtime_assert
        copy = meta_utils._safe_copy

        def take(mode: Any, func: Any, inputs: Any, known: Any, result: Any, real: Any) -> Any:
            return result  # comparing where the two tensors lie in memory would fix their sizes

        def note(env: Any, condition: Any, text: str, *args: Any, **kwargs: Any) -> Any:
            if text.startswith(_DECIDED):
                place, is_answer = user_place(), text.endswith(("== True", "== False"))
                if not (is_answer and only_raises(place)):  # else it is one number of many
                    self._decisions.append((free_unbacked_symbols(condition), place, is_answer))
            return defer(env, condition, text, *args, **kwargs)

        def fill(dst: Tensor, src: Tensor | None) -> None:
            if isinstance(src, nn.Parameter):  # torch leaves their values out
                dst.copy_(src)
            else:
                copy(dst, src)

        meta_utils._safe_copy = fill
        FakeTensorMode._maybe_infer_fake_kernel_from_pytree_out = take  # type: ignore
        ShapeEnv.guard_or_defer_runtime_assert = note  # type: ignore
        try:
            with config.patch(fake_tensor_propagate_real_tensors=True):
                yield
        finally:
            meta_utils._safe_copy = copy
            FakeTensorMode._maybe_infer_fake_kernel_from_pytree_out = compare  # type: ignore
            ShapeEnv.guard_or_defer_runtime_assert = defer  # type: ignore

    def fault(self, program: ExportedProgram) -> str | None:
        """What makes the program one for the example alone, in words, or None.

        Sets `branches`, the places where other inputs may go another way, which the program checks,
        and `compared`, the whole numbers with which values are compared there.
        """
        if not self._decisions:
            return None
        given = {
            spec.arg.name
            for spec in program.graph_signature.input_specs
            if spec.kind == InputKind.USER_INPUT
        }
        asserted: dict[str, list[Node]] = {}
        for node in program.graph.nodes:
            if node.target is ASSERTION:  # its text is the only place that keeps the symbols
                for symbol in _SYMBOL.findall(str(node.args[1])):
                    asserted.setdefault(symbol, []).append(node)
        for symbols, place, is_answer in self._decisions:
            for symbol in map(str, symbols):
                checks = asserted.get(symbol)
                if checks is None or any(_depends_on_values(node, given) for node in checks):
                    if checks is None or not is_answer:
                        return f"it branches on values of its inputs at {place}"
                    if str(place) not in self.branches:
                        self.branches.append(str(place))
                    for check in checks:
                        check.meta[BRANCH] = str(place)
                    numbers = sorted({n for check in checks for n in _compared_with(check)})
                    self.compared += [n for n in numbers if n not in self.compared]
        return None


def _compared_with(node: Node) -> Iterator[int]:
    """The whole numbers in comparisons of tensors that a number depends on."""
    waiting = [node]
    for source in waiting:
        if op_name(source) in _COMPARISONS and isinstance(source.meta.get("val"), Tensor):
            yield from (a for a in source.args if type(a) is int)
        waiting += [n for n in source.all_input_nodes if n not in waiting]


def _depends_on_values(node: Node, given: set[str]) -> bool:
    """Whether a number is read from values of inputs, or drawn; their sizes do not count."""
    waiting = [node]
    for source in waiting:
        if source.name in given or (source.op == "call_function" and is_random(source)):
            return True
        read = source.all_input_nodes
        is_size = source.target is aten.sym_size.int and read[0].name in given
        if not is_size:  # sizes of other tensors may count values
            waiting += [n for n in read if n not in waiting]
    return False


def in_example(number: Any) -> int | None:
    """What a number of an export is in the example; None where that is not known."""
    if not isinstance(number, torch.SymInt):
        return int(number)
    node = number.node
    env = node.shape_env
    known = {**env.backed_var_to_val, **env.real_tensor_prop_unbacked_vals}
    value = node.expr.xreplace(known)
    return int(value) if value.is_number else None


def write_check(graph: Graph, assertion: Node, condition: Any) -> None:
    """Write into `graph` what an exported assertion demands.

    Args:
        graph: receives a node.
        assertion: of an exported program.
        condition: what the assertion's condition is in `graph`.
    """
    sources = _numbers_before(assertion)
    if any(n.target is aten.sym_storage_offset.default for n in sources):
        return  # where a tensor lies in memory decides nothing that a graph computes
    if _is_size_of_none_or_more(assertion.args[0]):
        return
    where, code = next(filter(None, map(_recorded_at, sources)), ("forward", "a check of values"))
    check = graph.call_function(expect_values, (condition, where, code))
    if BRANCH in assertion.meta:
        check.meta[BRANCH] = assertion.meta[BRANCH]


def _is_size_of_none_or_more(condition: Any) -> bool:
    """Whether nothing is asked but that a tensor's size is 0 or more, as all are."""
    if not isinstance(condition, Node) or condition.target is not operator.ge:
        return False
    size, least = condition.args
    return (
        isinstance(size, Node)
        and size.target is aten.sym_size.int
        and type(least) is int
        and least == 0
    )


def _numbers_before(node: Node) -> list[Node]:
    """The nodes that a number depends on, nearest first, up to the tensors it is read from."""
    found = list(node.all_input_nodes)
    for source in found:
        if not isinstance(source.meta.get("val"), Tensor):
            found += [n for n in source.all_input_nodes if n not in found]
    return found


def _recorded_at(node: Node) -> tuple[str, str] | None:
    """Where in the user's code the node was recorded, and the code there."""
    lines = _LINE.findall(str(node.meta.get("stack_trace", "")))
    if not lines:
        return None
    path, number, code = lines[-1]
    return f"line {number} of {os.path.basename(path)}", code.strip()
