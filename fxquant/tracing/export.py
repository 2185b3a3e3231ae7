"""The second way: `torch.export` with dynamic batch and length, brought back to a plain graph.

An exported program lifts parameters to inputs, flattens arguments and results, and wraps regions
that ran under `no_grad` or `autocast` into submodules. Here parameters become `get_attr` nodes
again, arguments and results get back their structure, and those regions are inlined.
"""

import inspect
import operator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from fxquant.graph.calls import Call
from fxquant.graph.grouped_matmul import LIBRARY_OPS
from fxquant.graph.layers import WRAPPED
from fxquant.graph.left_alone import left_alone
from fxquant.graph.shapes import MODULE_PATH
from fxquant.graph.structures import (
    expect_constant,
    is_named_tuple,
    named_fields,
    named_tuple,
    output_dict,
    seed_random,
)
from fxquant.tracing.capture import Capture, describe_error, left_out
from fxquant.tracing.each_entry import EachEntry
from fxquant.tracing.export_surroundings import CompilerQuestions, quiet_export
from fxquant.tracing.known_values import ASSERTION, KnownValues, write_check
from fxquant.tracing.loop_marks import LoopMarks, ShortLoopError
from fxquant.tracing.number_tensors import NumberTensors, numbers_in
from fxquant.tracing.rolling import CannotRollError, roll_loops
from fxquant.tracing.seeds import RESEED, fold_seeded_draws, recorded_seeds
from fxquant.tracing.signature import (
    Argument,
    call,
    graph_arguments,
    placeholders,
    unfit_argument,
)
from fxquant.tracing.views import write_view
from fxquant.tracing.vmap import without_vmap

aten = torch.ops.aten
higher_order = torch.ops.higher_order

SHORT_LOOPS = "a loop over a size has too few rounds with this example"
DYNAMIC_DIMENSIONS = 2  # batch and length
_DROPPED = (aten._assert_tensor_metadata.default,)
_IDENTITIES = (aten.dropout.default, aten.alias.default)  # a third argument True means training
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)


class _UnsupportedError(Exception):
    """The exported program has something that a plain graph cannot express."""


def capture_export(
    module: nn.Module,
    inputs: Call,
    *,
    are_sizes_free: bool = True,
    answers: tuple[bool, ...] = (False, True),
    are_values_known: bool = False,
    takes_short_loops: bool = True,
) -> Capture | str:
    """Export `module` on example inputs; return the reason as text if that is not possible.

    Args:
        module: a working copy; it is left as it was, and its parameters stay shared.
        inputs: one call's arguments. A size of 1 is taken as fixed, so let there be none that may
            change.
        are_sizes_free: whether batch and length may change; else the graph is for these sizes.
        answers: what a forward is told that asks whether it is being compiled, one after the other
            while it fails: whether it runs as in eager mode.
        are_values_known: go through checks by value as the example does, and check in the graph
            that every input does so (see `known_values.py`).
        takes_short_loops: whether a loop over a size that has too few rounds with this example is
            left as it is; else the export ends there, with the reason `SHORT_LOOPS`.
    """
    arguments = graph_arguments(module, inputs)
    unfit = unfit_argument(arguments)
    if unfit is not None:
        return unfit
    # One tensor passed twice would be taken as one input, so each argument is a tensor of its own.
    example = {a.name: Call((a.value,)).clone().args[0] for a in arguments if a.is_input}
    reasons: list[str] = []
    for rolled in (True, False) if are_sizes_free else (False,):
        for as_in_eager_mode in answers:
            marks = LoopMarks(takes_short_loops=takes_short_loops) if rolled else None
            questions = CompilerQuestions(
                as_in_eager_mode=as_in_eager_mode, are_values_known=are_values_known
            )
            found = _attempt(module, arguments, example, marks, questions, are_sizes_free)
            if not isinstance(found, str) or found == SHORT_LOOPS:
                return found
            if found not in reasons:
                reasons.append(found)
            if not questions.were_asked:
                break
        if marks is not None and not marks.count:
            break
    return "; ".join(reasons)


def _attempt(
    module: nn.Module,
    arguments: list[Argument],
    example: dict[str, Any],
    marks: LoopMarks | None,
    questions: CompilerQuestions,
    are_sizes_free: bool,
) -> Capture | str:
    """One export; with `marks`, a loop over a size becomes one node."""
    try:
        flat = _Flat(module, arguments, marks).eval()
        values = KnownValues() if questions.are_values_known else None
        known = nullcontext() if values is None else values.known()
        with left_alone(module), quiet_export(), questions.answered(), known:
            program = _export(flat, example, are_sizes_free)
        fault = None if marks is None else marks.fault
        if fault is not None:
            return fault
        with quiet_export():
            program = without_vmap(program)
        fault = None if values is None else values.fault(program)
        if fault is not None:
            return fault
        capture = _capture(program, arguments, flat.output)
        free = DYNAMIC_DIMENSIONS if are_sizes_free else 0
        fixed = _fixed_sizes(arguments, free)
        was_asked = questions.were_asked and not questions.as_in_eager_mode
        if values is not None:
            capture = replace(capture, branches=values.branches, compared=values.compared)
        return replace(capture, fixed=fixed, was_asked=was_asked)
    except ShortLoopError:
        return SHORT_LOOPS
    except (CannotRollError, _UnsupportedError) as error:
        return str(error)
    except Exception as error:  # a user's forward may raise anything at all
        return describe_error(error)


def _export(module: nn.Module, values: dict[str, Any], are_sizes_free: bool) -> ExportedProgram:
    shapes = pytree.tree_map(_dynamic_dimensions, values) if are_sizes_free else None
    return torch.export.export(module, (), values, dynamic_shapes=shapes, strict=False)


def _dynamic_dimensions(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None
    return dict.fromkeys(range(min(DYNAMIC_DIMENSIONS, value.ndim)), Dim.AUTO)


def _fixed_sizes(arguments: list[Argument], free: int) -> list[str]:
    """Guards for the sizes that `torch.export` was told to take as fixed; it does not note them."""
    tensors = [(a.name, a.value) for a in arguments if a.is_input and isinstance(a.value, Tensor)]
    return [
        f"L['{name}'].size()[{dimension}] == {size}"
        for name, tensor in tensors
        for dimension, size in enumerate(tensor.shape)
        if dimension >= free
    ]


class _FlatOutput:
    """The shape of a model's result, and its tensors as a flat tuple."""

    def __init__(self) -> None:
        self.template: Any = None
        self.dropped: list[str] = []

    def flatten(self, result: Any) -> tuple[Tensor, ...]:
        """Record the template of `result` and return its tensors."""
        self.dropped = []
        tensors: list[Tensor] = []
        self.template = self._template(result, "output", tensors)
        if not tensors:
            raise _UnsupportedError(f"its output holds no tensor ({type(result).__name__})")
        return tuple(tensors)

    def _template(self, value: Any, where: str, tensors: list[Tensor]) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return _Slot(len(tensors) - 1)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if is_named_tuple(value):
            parts = [self._template(v, f"{where}.{k}", tensors) for k, v in value._asdict().items()]
            return _NamedTemplate(type(value).__name__, tuple(value._fields), parts)
        fields = named_fields(value)
        if fields is not None or type(value) is dict:
            items = (fields if fields is not None else value).items()
            found = {k: self._template(v, f"{where}.{k}", tensors) for k, v in items}
            kept = {k: v for k, v in found.items() if not isinstance(v, _Dropped)}
            return OutputTemplate(kept) if fields is not None else kept
        if type(value) in (tuple, list):
            listed = [self._template(v, f"{where}[{i}]", tensors) for i, v in enumerate(value)]
            return type(value)(p for p in listed if not isinstance(p, _Dropped))
        self.dropped.append(left_out(where, value))
        return _Dropped()


class _Slot(int):
    """The place of a tensor in the flat output."""


class _Dropped:
    """A part of the output that a graph cannot hold."""


class OutputTemplate(dict[str, Any]):
    """Named outputs, to become an `OutputDict`."""


class _NamedTemplate:
    """A named tuple of outputs."""

    def __init__(self, name: str, fields: tuple[str, ...], parts: list[Any]) -> None:
        self.name, self.fields, self.parts = name, fields, parts


class _Flat(nn.Module):
    """Calls a module with its inputs by name and returns a flat tuple of tensors.

    The module is called as a whole, with its hooks and whatever else its class does in a call.
    """

    def __init__(
        self, module: nn.Module, arguments: list[Argument], marks: LoopMarks | None
    ) -> None:
        super().__init__()
        self.add_module(WRAPPED, module)
        output = self.output = _FlatOutput()
        inputs, numbers = [a for a in arguments if a.is_input], numbers_in(module)

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            values = dict(zip((a.name for a in inputs), args, strict=False)) | kwargs
            marked = nullcontext() if marks is None else marks.watching(values.values())
            with EachEntry(), NumberTensors(numbers, module), recorded_seeds(), marked:
                return output.flatten(call(module, arguments, values))

        forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(a.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for a in inputs]
        )
        self.forward = forward


def _capture(program: ExportedProgram, arguments: list[Any], output: _FlatOutput) -> Capture:
    graph = Graph()
    values: dict[str, Any] = {}
    for argument, default in placeholders(arguments):
        values[argument.name] = graph.placeholder(
            argument.name, default_value=(*default, inspect.Parameter.empty)[0]
        )
    for argument, _ in placeholders(arguments):
        if argument.is_constant:
            value = values[argument.name]
            graph.call_function(expect_constant, (value, argument.value, argument.name))
    example: dict[str, Any] = program.example_inputs[1]
    leaves = iter(_input_leaves(graph, values, example))
    environment: dict[Node, Any] = {}
    attributes: dict[str, Node] = {}
    constants: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    names = [n for n in program.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(names, program.graph_signature.input_specs, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            environment[node] = inputs[node.name] = next(leaves)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            target = str(spec.target).removeprefix(f"{WRAPPED}.")
            if spec.kind == InputKind.CONSTANT_TENSOR:
                constants[target] = program.constants[str(spec.target)]
            if target not in attributes:
                attributes[target] = graph.get_attr(target)
            environment[node] = attributes[target]
        else:
            raise _UnsupportedError(f"an input of kind {spec.kind.name} cannot be in a plain graph")
    _copy_nodes(graph, program.graph_module, environment)
    specs = program.graph_signature.output_specs
    results = next(n for n in program.graph.nodes if n.op == "output").args[0]
    tensors = []
    for result, spec in zip(results, specs, strict=True):
        found = environment.get(result, result) if isinstance(result, Node) else result
        if spec.kind == OutputKind.USER_OUTPUT:
            tensors.append(found)
        elif spec.kind in _MUTATIONS:  # what the program hands out, the forward wrote in place
            is_buffer = spec.kind == OutputKind.BUFFER_MUTATION
            owner = str(spec.target).removeprefix(f"{WRAPPED}.")
            written = attributes[owner] if is_buffer else inputs[str(spec.target)]
            if found is not written:
                graph.call_function(aten.copy_.default, (written, found))
    graph.output(_build_output(graph, output.template, tensors))
    fold_seeded_draws(graph, constants)
    roll_loops(graph)
    graph.lint()
    return Capture(graph, constants, guards=list(program._guards_code), left_out=output.dropped)


def _input_leaves(graph: Graph, values: dict[str, Any], example: Any) -> list[Any]:
    """A node for each leaf of the flattened example, in `torch.export`'s order."""
    leaves = []
    for path, leaf in pytree.tree_flatten_with_path(example)[0]:
        node: Any = values[getattr(path[0], "key", "")]
        for step in path[1:]:
            key = getattr(step, "key", getattr(step, "idx", None))
            if key is None:
                raise _UnsupportedError(f"an input of type {type(leaf).__name__} inside an object")
            node = graph.call_function(operator.getitem, (node, key))
        leaves.append(node)
    return leaves


def _copy_nodes(graph: Graph, gm: GraphModule, environment: dict[Node, Any]) -> Any:
    """Copy the nodes of `gm` into `graph`, inlining regions; return what it outputs."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in environment:
            continue
        if node.op == "output":
            return torch.fx.node.map_arg(node.args[0], lambda n: environment[n])
        if node.op == "get_attr":
            value = getattr(gm, str(node.target), None)
            environment[node] = value if isinstance(value, GraphModule) else graph.node_copy(node)
        elif node.op == "call_function" and node.target in _DROPPED:
            continue
        elif node.target is ASSERTION:
            write_check(graph, node, environment.get(node.args[0], node.args[0]))
        elif node.target is RESEED:
            graph.call_function(seed_random, node.args)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            environment[node] = _inline(graph, node, environment)
        elif node.target is operator.getitem and isinstance(
            environment.get(node.args[0]), tuple | list
        ):  # of an inlined region
            environment[node] = environment[node.args[0]][node.args[1]]
        elif node.target in _IDENTITIES and node.args[2:3] != (True,):
            environment[node] = environment[node.args[0]]
        else:
            copied = graph.node_copy(node, lambda n: environment[n])
            copied.target = LIBRARY_OPS.get(str(copied.target), copied.target)
            write_view(graph, node, copied)
            copied.meta = {MODULE_PATH: innermost_module(node)}
            environment[node] = copied
    return None


def _inline(graph: Graph, node: Node, environment: dict[Node, Any]) -> Any:
    """Copy the body of a `no_grad` or disabled `autocast` region."""
    args: list[Any] = [environment[a] if isinstance(a, Node) else a for a in node.args]
    if node.target is higher_order.wrap_with_set_grad_enabled:
        _, body, *operands = args
    elif node.target is higher_order.wrap_with_autocast and args[2] is False:
        _, _, _, _, body, *operands = args
    else:
        raise _UnsupportedError(f"a region of kind {node.target} cannot be in a plain graph")
    inner = [n for n in body.graph.nodes if n.op == "placeholder"]
    return _copy_nodes(graph, body, dict(zip(inner, operands, strict=True)))


def innermost_module(node: Node) -> str:
    """The path of the innermost module in which the op ran; a repeated call has the same path."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    path = path.removeprefix(WRAPPED).removeprefix(".")
    return "" if path.startswith("_empty") else ".".join(p.split("@")[0] for p in path.split("."))


def _build_output(graph: Graph, template: Any, tensors: list[Any]) -> Any:
    if isinstance(template, _Slot):
        return tensors[template]
    if isinstance(template, _NamedTemplate):
        parts = [_build_output(graph, part, tensors) for part in template.parts]
        return graph.call_function(named_tuple, (template.name, template.fields, *parts))
    if isinstance(template, OutputTemplate):
        fields = {k: _build_output(graph, v, tensors) for k, v in template.items()}
        return graph.call_function(output_dict, (), fields)
    if isinstance(template, dict):
        return {k: _build_output(graph, v, tensors) for k, v in template.items()}
    if isinstance(template, tuple | list):
        return type(template)(_build_output(graph, v, tensors) for v in template)
    return template
