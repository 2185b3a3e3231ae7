"""From a recorded graph to a `GraphModule` whose attributes have names that Python allows.

before: `call_module[target="block1-0.fc"]`, on the module that was traced
after:  `call_module[target=block1_0.fc]`, on a module that holds just what the graph uses; that
        the user calls it `block1-0.fc` is kept beside the graph
"""

from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from fxquant.graph.graph_module import FxquantGraph
from fxquant.graph.layers import NAMES_KEY, finish, target_of
from fxquant.tracing.capture import Capture


def assemble(capture: Capture, module: nn.Module) -> GraphModule:
    """A graph module of `capture`, with its own root.

    Args:
        capture: a graph that was recorded; its targets are changed.
        module: the module that it was recorded from.
    """
    objects: dict[str, Any] = {}
    targets: dict[str, str] = {}
    for node in capture.graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        path = str(node.target)
        if path not in targets:
            targets[path] = target_of(path, targets.values())
            objects[targets[path]] = find(capture, module, path)
        node.target = targets[path]
    names = {target: path for path, target in targets.items() if target != path}
    return make_graph_module(objects, capture.graph, type(module).__name__, {NAMES_KEY: names})


def find(capture: Capture, module: nn.Module, path: str) -> Any:
    """The module or tensor at `path`."""
    if path in capture.objects:
        return capture.objects[path]
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def make_graph_module(
    objects: dict[str, Any], graph: Graph, class_name: str, meta: dict[str, Any]
) -> GraphModule:
    """A graph module in eval mode that holds `objects`.

    A tensor that lies inside a module that is called is read from that module: if it is quantized
    later, what is read is what it then computes with.
    """
    modules = {t: value for t, value in objects.items() if isinstance(value, nn.Module)}
    names, kept = dict(meta.get(NAMES_KEY, {})), dict[str, Any]()
    for target in sorted(objects, key=lambda t: (t not in modules, t.count("."))):
        value = objects[target]
        owner = next((o for o in modules if target.startswith(f"{o}.")), None)
        if owner is None or _at(modules[owner], target[len(owner) + 1 :]) is value:
            kept[target] = value
        else:  # it lies there in another layout
            apart = target_of(target.replace(".", "_"), {*objects, *kept})
            kept[apart] = value
            names[apart] = names.pop(target, target)
            for node in graph.nodes:
                if node.op in ("get_attr", "call_module") and node.target == target:
                    node.target = apart
    name = class_name if class_name.isascii() and class_name.isidentifier() else "Graph"
    gm = FxquantGraph(kept, graph, name)
    gm.meta.update({**meta, NAMES_KEY: names})
    finish(gm)
    return gm.eval()  # a new graph module is in train mode, whatever its modules are


def _at(module: nn.Module, path: str) -> Any:
    """What is at a path inside a module, or None."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value
