"""Opaque children of a symbolic graph, exported one by one and laid into it.

before: `y = self.block(x)`, with `block` opaque since symbolic tracing failed inside it
after:  the nodes that `torch.export` records for `block`, with its parameters under their own names
"""

from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxquant.graph.calls import Call
from fxquant.graph.left_alone import left_alone, process_left_alone
from fxquant.tracing.assemble import assemble
from fxquant.tracing.capture import Capture
from fxquant.tracing.export import capture_export
from fxquant.tracing.guards import insert_guards
from fxquant.tracing.needed import export_examples, needed_guards
from fxquant.tracing.oracle import Oracle, run_alone


def inline_children(
    capture: Capture, module: nn.Module, oracle: Oracle, notes: list[str]
) -> Capture | None:
    """Replace each opaque child that can be exported by its nodes.

    Args:
        capture: a symbolic graph with opaque children.
        module: the working copy it was recorded from.
        oracle: gives the example.
        notes: receives a line for each child that stays opaque.

    Returns:
        A new graph; None where no child could be exported.
    """
    seen = _inputs_of(module, list(capture.opaque), oracle.example)
    exported: dict[str, Capture] = {}
    for path in capture.opaque:
        calls = seen.get(path, [])
        if len(calls) != 1:
            notes.append(f"{path}: export: it is called {len(calls)} times")
            continue
        found = _export_child(module.get_submodule(path), calls[0])
        if isinstance(found, str):
            notes.append(f"{path}: export: {found}")
        elif found.left_out:
            notes.append(f"{path}: export: {found.left_out[0]}")
        else:
            exported[path] = found
    if not exported:
        return None
    graph, objects, guards = Graph(), dict(capture.objects), list(capture.guards)
    values: dict[Node, Any] = {}
    for node in capture.graph.nodes:
        target = str(node.target)
        if node.op == "output":
            graph.output(map_arg(node.args[0], lambda n: values[n]))
        elif node.op == "call_module" and target in exported:
            values[node] = _lay_in(graph, exported[target], target, node, values, objects)
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
    still = {p: r for p, r in capture.opaque.items() if p not in exported}
    return Capture(graph, objects, still, guards, [], list(capture.left_out))


def _export_child(child: nn.Module, call: Call) -> Capture | str:
    """The child's graph, with checks of the sizes that it needs."""
    oracle = Oracle(child, call)
    found = capture_export(child, next(export_examples(oracle))[0])
    if isinstance(found, str):
        return found
    copied = Graph()
    copied.output(copied.graph_copy(found.graph, {}))
    gm = assemble(replace(found, graph=copied), child)
    needed = needed_guards(gm, found.guards, found.fixed, oracle)
    if isinstance(needed, str):
        return needed
    if needed:
        insert_guards(found.graph, needed)
    return replace(found, guards=[], fixed=[])


def _lay_in(
    graph: Graph, child: Capture, path: str, call: Node, outer: dict[Node, Any],
    objects: dict[str, Any],
) -> Any:  # fmt: skip
    """Copy the nodes of `child` to the place of `call`; what they compute."""
    names = [n for n in child.graph.nodes if n.op == "placeholder"]
    given = Call(tuple(call.args), dict(call.kwargs)).bind(
        {str(n.target): (*n.args, None)[0] for n in names}
    )
    values: dict[Node, Any] = {n: map_arg(given[str(n.target)], lambda m: outer[m]) for n in names}
    for node in child.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return map_arg(node.args[0], lambda n: values[n])
        copied = graph.node_copy(node, lambda n: values[n])
        if node.op in ("get_attr", "call_module"):
            own = str(node.target)
            copied.target = f"{path}.{own}"
            if own in child.objects:
                objects[copied.target] = child.objects[own]
        copied.meta = _with_prefix(node, path)
        values[node] = copied
    return None


def _with_prefix(node: Node, path: str) -> dict[str, Any]:
    return {
        key: f"{path}.{value}".rstrip(".") if isinstance(value, str) else value
        for key, value in node.meta.items()
    }


def _inputs_of(module: nn.Module, names: list[str], example: Call) -> dict[str, list[Call]]:
    """What each named child is called with when `module` runs on the example."""
    seen: dict[str, list[Call]] = {}

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen.setdefault(name, []).append(Call(args, kwargs).clone())

        return hook

    with process_left_alone(), left_alone(module):
        for name in names:
            child = module.get_submodule(name)
            child.register_forward_pre_hook(hook_for(name), with_kwargs=True)
        run_alone(module, (example,))
    return seen
