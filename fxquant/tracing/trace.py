"""`trace`: symbolic where that works, else export, else opaque with its children traced.

For each module, from the root down:

1. symbolic tracing, if no child stays opaque and the graph computes what the module computes;
2. `torch.export`, where example inputs are known;
3. the symbolic graph with opaque children; each of those starts again at 1, with the inputs that
   it saw when the model ran on the example;
4. the module itself is opaque: a graph of a single node around it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from fxquant.errors import OptionError, TraceError
from fxquant.graph.scopes import WRAPPED, user_name
from fxquant.graph.shapes import record_shapes
from fxquant.graph.stand_in import stand_in
from fxquant.tracing.canonical import canonicalize
from fxquant.tracing.export import capture_export
from fxquant.tracing.prepare import prepare
from fxquant.tracing.signature import (
    ExampleInputs,
    clone,
    graph_arguments,
    is_variadic,
    placeholder_order,
)
from fxquant.tracing.symbolic import Capture, capture_symbolic, describe_error
from fxquant.tracing.trace_report import REPORT_KEY, OpaqueModule, TraceReport, weigh
from fxquant.tracing.verify import mismatch


def trace(model: nn.Module, example_inputs: object = None) -> GraphModule:
    """Capture `model` as a graph in which every linear layer is a node.

    Args:
        model: any module; it is not changed. The graph shares its tensors and is in eval mode.
        example_inputs: one call's arguments: a tensor, a tuple or list (positional), or a dict
            (keywords). Optional, but without them `torch.export` cannot be tried, optional
            arguments keep their defaults, and the graph is not verified against the model.

    Returns:
        A `GraphModule`; `trace_report` tells how it was made.

    Raises:
        TraceError: the model does not run on the example inputs.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(
            "model",
            found=type(model).__name__,
            needed="a torch.nn.Module",
            remedy="Pass the model itself, not its path or its output.",
        )
    inputs = None if example_inputs is None else ExampleInputs.of(example_inputs)
    prepared = prepare(model)
    if inputs is not None:
        _check_runs(prepared, inputs)
    findings = _Findings()
    root = _trace_module(prepared, inputs, "", findings)
    if not isinstance(root, GraphModule):
        root = _graph_around(root, inputs)
    if inputs is not None:
        record_shapes(root, clone(inputs.args), clone(inputs.kwargs))
    total, traced, unreached = weigh(root, prepared)
    root.meta[REPORT_KEY] = replace(
        findings.report(), linear_elements=total, traced_elements=traced, unreached=unreached
    )
    return root


@dataclass
class _Findings:
    """What tracing learns on its way down."""

    way: str = "opaque"
    attempts: list[str] = field(default_factory=list)
    opaque: list[OpaqueModule] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def report(self) -> TraceReport:
        return TraceReport(self.way, self.attempts, self.opaque, left_out=self.left_out)


def _check_runs(module: nn.Module, inputs: ExampleInputs) -> None:
    graph_arguments(module, inputs)
    try:
        with torch.no_grad():
            module(*clone(inputs.args), **clone(inputs.kwargs))
    except Exception as error:  # a user's forward may raise anything at all
        raise TraceError(
            f"{type(module).__name__}.forward",
            found=f"that it raises on the example inputs: {describe_error(error)}",
            needed="inputs the model runs on",
            remedy="Check the shapes, dtypes and argument names of the example inputs.",
        ) from error


def _trace_module(
    module: nn.Module, inputs: ExampleInputs | None, path: str, findings: _Findings
) -> nn.Module:
    """A graph of `module`, or `module` itself with its children replaced by graphs."""
    where = user_name(path)
    symbolic = capture_symbolic(module, inputs)
    if isinstance(symbolic, Capture):
        symbolic = replace(symbolic, gm=canonicalize(symbolic.gm, module))
        wrong = mismatch(symbolic.gm, module, inputs) if inputs is not None else None
        if wrong is None and not symbolic.opaque:
            return _taken(symbolic.gm, "symbolic", path, findings)
        opaque = ", ".join(f"{p}: {r}" for p, r in list(symbolic.opaque.items())[:3])
        reason = wrong or f"opaque inside: {opaque}"
    else:
        wrong = reason = symbolic
    findings.attempts.append(f"{where}: symbolic: {reason}")
    if inputs is not None:
        notes: list[str] = []
        exported = capture_export(module, inputs, notes)
        if isinstance(exported, Capture):
            gm = canonicalize(exported.gm, module)
            exported_wrong = mismatch(gm, module, inputs)
            if exported_wrong is None:
                findings.left_out += [f"{where}: {note}" for note in notes]
                return _taken(gm, "export", path, findings)
            exported = exported_wrong
        findings.attempts.append(f"{where}: export: {exported}")
    if isinstance(symbolic, Capture) and wrong is None:
        seen = _inputs_of(module, symbolic.opaque, inputs)
        for child, why in symbolic.opaque.items():
            submodule = module.get_submodule(child)
            child_path = f"{path}.{child}" if path else child
            opened = _open(submodule, seen.get(child), child_path, why, findings)
            symbolic.gm.set_submodule(child, opened)
        return _taken(symbolic.gm, "symbolic", path, findings)
    return _open(module, inputs, path, str(wrong), findings)


def _taken(gm: GraphModule, way: str, path: str, findings: _Findings) -> GraphModule:
    if not path:
        findings.way = way
    return gm


def _open(
    module: nn.Module, inputs: ExampleInputs | None, path: str, why: str, findings: _Findings
) -> nn.Module:
    """Keep `module` as it is and replace its children by graphs."""
    findings.opaque.append(OpaqueModule(user_name(path), type(module).__name__, why))
    children = dict(_callable_children(module))
    seen = _inputs_of(module, children, inputs)
    replaced: dict[nn.Module, nn.Module] = {}
    for name, child in children.items():
        if child not in replaced:
            replaced[child] = _child_graph(
                child, seen.get(name), f"{path}.{name}" if path else name, findings
            )
        module.set_submodule(name, replaced[child])
    return module


def _callable_children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children that may be called; containers that code may index or iterate are entered."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from _callable_children(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield prefix + name, child


def _child_graph(
    child: nn.Module, inputs: ExampleInputs | None, path: str, findings: _Findings
) -> nn.Module:
    """A graph in the place of `child` that answers like it to the opaque parent's code."""
    if type(child).forward is nn.Linear.forward or not any(True for _ in child.children()):
        if not isinstance(child, nn.Linear):
            return child  # a norm, an embedding: nothing inside to reach
        graph = Graph()
        graph.output(graph.call_module(WRAPPED, (graph.placeholder("input"),)))
        return stand_in(GraphModule({WRAPPED: child}, graph), child)
    traced = _trace_module(child, inputs, path, findings)
    return stand_in(traced, child) if isinstance(traced, GraphModule) else traced


def _inputs_of(
    module: nn.Module, names: Any, inputs: ExampleInputs | None
) -> dict[str, ExampleInputs]:
    """What each named child is called with, first, when `module` runs on `inputs`."""
    seen: dict[str, ExampleInputs] = {}
    if inputs is None:
        return seen
    with _recording(module, names, seen), torch.no_grad():
        module(*clone(inputs.args), **clone(inputs.kwargs))
    return seen


@contextmanager
def _recording(module: nn.Module, names: Any, seen: dict[str, ExampleInputs]) -> Iterator[None]:
    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen.setdefault(name, ExampleInputs(clone(args), clone(kwargs)))

        return hook

    handles = [
        module.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True)
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _graph_around(module: nn.Module, inputs: ExampleInputs | None) -> GraphModule:
    """A graph whose only call is the opaque root."""
    graph = Graph()
    arguments = graph_arguments(module, inputs)
    nodes: dict[str, Any] = {}
    for argument in placeholder_order(arguments):
        if argument.is_constant:
            nodes[argument.name] = graph.placeholder(argument.name, default_value=argument.value)
        elif is_variadic(argument):
            raise TraceError(
                f"{type(module).__name__}.forward",
                found=f"that it takes *{argument.name}",
                needed="named arguments",
                remedy="Wrap the model in a module whose forward names its arguments.",
            )
        else:
            nodes[argument.name] = graph.placeholder(argument.name)
    graph.output(graph.call_module(WRAPPED, (), nodes))
    return GraphModule({WRAPPED: module}, graph, type(module).__name__).eval()


def graph_of(model: nn.Module, args: tuple[Any, ...] | None, kwargs: dict[str, Any]) -> GraphModule:
    """The model's graph; one that `trace` made is taken as it is.

    Args:
        model: any module, or a graph from `trace`.
        args: positional arguments of an example call, or None for no example.
        kwargs: its keyword arguments.
    """
    if isinstance(model, GraphModule) and REPORT_KEY in model.meta:
        return model
    return trace(model, None if args is None else ExampleInputs(args, kwargs))
