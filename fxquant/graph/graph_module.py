"""The graph module that fxquant makes: it can be pickled, and a loaded one says which node failed.

torch's own pickles the generated code and traces it again when it is read, which breaks on graphs
that hold ops as one node. This one pickles its nodes, and its modules as they pickle themselves:
quantized layers in the layout of files, which no CPU has to itself.
"""

import operator
import traceback
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from fxquant.errors import FxquantError, OptionError, RunError, check_type
from fxquant.graph.layers import tensor_attribute
from fxquant.graph.shapes import KEPT

_GENERATED = "<eval_with_key>"  # how torch.fx calls the file of generated code
_SPACES = {
    "torch": torch, "torch.nn.functional": F, "torch._C._nn": torch._C._nn,
    "torch.linalg": torch.linalg, "torch.fft": torch.fft, "torch.special": torch.special,
    "operator": operator,
}  # fmt: skip


def check_graph(argument: str, value: object, error: type[FxquantError] = OptionError) -> None:
    """Raise an `OptionError` (or `error`) unless `value` is a graph."""
    remedy = "Pass the graph that trace, quantize, static_quantize or load_model returned."
    check_type(argument, value, GraphModule, remedy, error)


class FxquantGraph(GraphModule):
    """A `GraphModule` that pickles its nodes instead of its code.

    Attributes:
        reports_nodes: whether an exception of a call becomes a `RunError` that names the node. That
            is so for a graph from a file, whose code nobody wrote; a traced graph raises what the
            model would raise.
    """

    reports_nodes = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph.

        Raises:
            RunError: a node of a graph from a file failed.
        """
        if not self.reports_nodes or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        try:
            return super().__call__(*args, **kwargs)
        except FxquantError:
            raise
        except Exception as error:  # whatever an op raises
            raise self._run_error(error) from error

    def _run_error(self, error: Exception) -> RunError:
        node = self._failed_node(error)
        where = "the call of the graph" if node is None else f"node {node.name}"
        if node is not None and node.op != "output":
            where += f" ({node.op} {getattr(node.target, '__name__', node.target)})"
        return RunError(
            where,
            found=f"{type(error).__name__}: {str(error)[:1000]}",
            needed="inputs that the graph takes",
            remedy="Pass inputs like those of the model that was saved; if they are, the file is "
            "not the model.",
        )

    def _failed_node(self, error: Exception) -> Node | None:
        lines: dict[int, int | None] = getattr(self, "_lineno_map", None) or {}
        start = getattr(self, "_prologue_start", 0)
        name = type(self).forward.__code__.co_filename
        for frame, line in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename == name and name.startswith(_GENERATED):
                number = lines.get(line - start)
                nodes = list(self.graph.nodes)
                if number is not None and number < len(nodes):
                    return nodes[number]
        return None

    def __copy__(self) -> "FxquantGraph":
        return self._like(FxquantGraph(self, self.graph, type(self).__name__))

    def __deepcopy__(self, memo: dict[int, Any]) -> "FxquantGraph":
        return self._like(super().__deepcopy__(memo))

    def _like(self, made: Any) -> "FxquantGraph":
        made.meta.update({k: v for k, v in self.meta.items() if k not in made.meta})
        made.training, made.reports_nodes = self.training, self.reports_nodes
        return made

    def __reduce__(self) -> Any:
        return restore_graph, (_state(self),)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()


def _state(gm: FxquantGraph) -> dict[str, Any]:
    """All that makes the graph again, as objects that pickle themselves."""
    numbers = {node: number for number, node in enumerate(gm.graph.nodes)}

    def numbered(value: Any) -> Any:
        return _Number(numbers[value]) if isinstance(value, Node) else value

    def plain(value: Any) -> Any:
        return map_aggregate(value, numbered)

    nodes = [
        (
            node.op, node.name, _named(node.target), plain(node.args), plain(node.kwargs),
            {key: node.meta[key] for key in KEPT if key in node.meta},
        )
        for node in gm.graph.nodes
    ]  # fmt: skip
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    tensors = {
        str(node.target): tensor_attribute(gm, node)
        for node in gm.graph.nodes
        if node.op == "get_attr" and called.isdisjoint(_parents(str(node.target)))
    }
    return {
        "name": type(gm).__name__,
        "nodes": nodes,
        "modules": {target: gm.get_submodule(target) for target in called},
        "tensors": tensors,
        "meta": dict(gm.meta),
        "training": gm.training,
        "reports_nodes": gm.reports_nodes,
    }


def restore_graph(state: dict[str, Any]) -> FxquantGraph:
    """Make a graph from its pickled state. Like all that is pickled, it must be trusted."""
    graph, nodes = Graph(), list[Node]()

    def node_of(value: Any) -> Any:
        return nodes[value.number] if isinstance(value, _Number) else value

    def linked(value: Any) -> Any:
        return map_aggregate(value, node_of)

    for op, name, target, args, kwargs, meta in state["nodes"]:
        node = graph.create_node(op, _found(target), linked(args), linked(kwargs), name=name)
        node.meta.update(meta)
        nodes.append(node)
    gm = build_graph_module({**state["modules"], **state["tensors"]}, graph, state["name"])
    gm.meta.update(state["meta"])
    gm.training = state["training"]
    gm.reports_nodes = state["reports_nodes"]
    return gm


def build_graph_module(objects: dict[str, Any], graph: Graph, class_name: str) -> FxquantGraph:
    """A graph module that holds `objects` at their paths.

    A tensor that the graph reads from inside a module that it calls is read from that module.
    """
    root = nn.Module()
    for target in sorted(objects, key=lambda t: t.count(".")):
        owner: nn.Module = root
        *parts, name = target.split(".")
        for part in parts:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        value = objects[target]
        if isinstance(value, nn.Parameter):
            owner.register_parameter(name, value)
        elif isinstance(value, torch.Tensor):
            owner.register_buffer(name, value)
        elif owner._modules.get(name) is not value:
            owner.add_module(name, value)
    return FxquantGraph(root, graph, class_name)


class _Number:
    """Stands for a node in pickled arguments."""

    def __init__(self, number: int) -> None:
        self.number = number


def _parents(target: str) -> list[str]:
    parts = target.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _named(target: Any) -> Any:
    """A target that pickles: builtin functions of torch do not pickle by themselves."""
    if isinstance(target, torch._ops.OpOverload):
        return ("op", target._schema.name, target._schema.overload_name or "default")
    name = getattr(target, "__name__", None)
    if not isinstance(target, str) and name is not None:
        for space, module in _SPACES.items():
            if getattr(module, name, None) is target:
                return ("function", space, name)
    return target


def _found(target: Any) -> Any:
    """Undo `_named`."""
    if not isinstance(target, tuple):
        return target
    kind, space, name = target
    if kind == "function":
        return getattr(_SPACES[space], name)
    namespace, _, packet = space.partition("::")
    return getattr(getattr(getattr(torch.ops, namespace), packet), name)
