"""What cannot be traced: the module stays as it is, one node of the graph around it.

Nothing in an opaque module is replaced but, later, its layers that are quantized, each in its
place. So whatever its code does with its children works as before.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from fxquant.graph.calls import Call
from fxquant.graph.layers import NAMES_KEY, WRAPPED, inner_layers, user_name
from fxquant.modules.weight_forms import form_of
from fxquant.tracing.assemble import make_graph_module
from fxquant.tracing.signature import graph_arguments, is_variadic, placeholders
from fxquant.tracing.trace_report import OpaqueModule


class AnyArguments(nn.Module):
    """Calls a module with whatever arguments come, where its signature does not name them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.add_module(WRAPPED, module)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module."""
        return self.get_submodule(WRAPPED)(*args, **kwargs)


def graph_around(module: nn.Module, inputs: Call | None) -> GraphModule:
    """A graph whose only call is `module` itself."""
    graph = Graph()
    wrapped: nn.Module = module
    names = {WRAPPED: ""}
    if inputs is None and is_variadic(module):
        args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
        wrapped, names = AnyArguments(module), {WRAPPED: "", f"{WRAPPED}.{WRAPPED}": ""}
        graph.output(graph.call_module(WRAPPED, (args, kwargs)))
    else:
        arguments = graph_arguments(module, inputs)
        positional, keyword = list[Any](), dict[str, Any]()
        for argument, default in placeholders(arguments):
            if default:
                node = graph.placeholder(argument.name, default_value=default[0])
            else:
                node = graph.placeholder(argument.name)
            if argument.is_positional:
                positional.append(node)
            else:
                keyword[argument.name] = node
        graph.output(graph.call_module(WRAPPED, tuple(positional), keyword))
    return make_graph_module({WRAPPED: wrapped}, graph, type(module).__name__, {NAMES_KEY: names})


def graph_of_layers(model: nn.Module, more: Mapping[str, nn.Module] | None = None) -> GraphModule:
    """A graph that calls each layer of a model, for decisions about them; it cannot be run.

    For models whose weights are not there yet, so that nothing can be traced.

    Args:
        model: has the layers.
        more: layers on parameters that code of the model's own multiplies with, by name.
    """
    layers = dict(inner_layers(model, lambda part: form_of(part) is not None)) | dict(more or {})
    owners = {name.rpartition(".")[0] for name in more or {}}
    for name, part in model.named_modules():
        if name in owners:
            continue
        if form_of(part) is None and any(True for _ in part.parameters(recurse=False)):
            layers.setdefault(name, part)
    graph = Graph()
    value = graph.placeholder("x")
    targets = {f"layer_{number}": name for number, name in enumerate(layers)}
    objects = dict(zip(targets, layers.values(), strict=True))
    graph.output([graph.call_module(target, (value,)) for target in targets])
    return make_graph_module(objects, graph, type(model).__name__, {NAMES_KEY: targets})


def describe_opaque(gm: GraphModule, reasons: dict[str, str]) -> list[OpaqueModule]:
    """The opaque modules of a graph, given the reason for each user's name."""
    found: dict[str, OpaqueModule] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        target = str(node.target)
        name = user_name(gm, target)
        module = gm.get_submodule(target)
        if name in reasons and name not in found:
            inner = module.get_submodule(WRAPPED) if isinstance(module, AnyArguments) else module
            found[name] = OpaqueModule(
                name, type(inner).__name__, reasons[name], foreign_classes(module)
            )
    return list(found.values())


def foreign_classes(module: nn.Module) -> tuple[str, ...]:
    """The classes inside an opaque module that are neither torch's nor fxquant's."""
    layers = {layer for _, layer in inner_layers(module)}
    names = {
        f"{type(part).__module__}.{type(part).__qualname__}"
        for part in module.modules()
        if part not in layers
    }
    return tuple(sorted(n for n in names if not n.startswith(("torch.nn.", "fxquant."))))
