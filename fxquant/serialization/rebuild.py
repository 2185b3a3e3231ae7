"""Plain data into graphs and modules. The data is not trusted.

Every name is checked before it becomes part of generated code, every target is resolved on the
allow-list, and every module is built from its class, its arguments and its tensors. Only a module
of a class that the caller allows is put together without its constructor.
"""

from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxquant.errors import LoadError
from fxquant.graph.graph_module import build_graph_module
from fxquant.graph.layers import RESERVED
from fxquant.graph.saved_ops import fault_of_call, written
from fxquant.graph.shapes import KEPT
from fxquant.modules.layer import QuantizedLayer
from fxquant.serialization.allowlist import (
    DESCRIBED,
    check_method,
    resolve_class,
    resolve_function,
)
from fxquant.serialization.describe import is_name, lies_in
from fxquant.serialization.layer_table import RECURRENT
from fxquant.serialization.layers import UnfitError, class_name, construct, fill
from fxquant.serialization.tensor_store import TensorReader
from fxquant.serialization.values import LeftOut, decode

_BARE = nn.Module()  # what it has, torch's own code reads of any module
NODE_KINDS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")


class Rebuilder:
    """Rebuilds the graphs and modules of one file.

    Args:
        modules: their descriptions.
        reader: gives their tensors.
        allowed: names of further functions that the caller trusts.
        allowed_modules: classes that the caller trusts.
        device: what devices in the graph become; None leaves them.
    """

    def __init__(
        self,
        modules: list[dict[str, Any]],
        reader: TensorReader,
        allowed: tuple[str, ...],
        allowed_modules: tuple[type[nn.Module], ...],
        device: torch.device | None = None,
    ) -> None:
        self.descriptions, self.reader = modules, reader
        self.allowed, self.allowed_modules, self.device = allowed, allowed_modules, device
        self._made: dict[int, nn.Module] = {}
        self._open: set[int] = set()

    def graph(self, data: dict[str, Any]) -> GraphModule:
        """Rebuild a graph with the modules and tensors it uses.

        Raises:
            LoadError: the data is damaged or names something that is not allowed.
        """
        root: dict[str, Any] = {}
        for target, number in data["modules"].items():
            root[checked_path(target)] = self.module(number)
        for target, reference in data["attributes"].items():
            root[checked_path(target)] = self.reader.tensor(reference)
        graph, nodes = Graph(), list[Node]()
        for entry in data["nodes"]:
            node = self._node(graph, entry, nodes)
            if node.name != entry["name"]:
                raise damaged(f"the node name {entry['name']!r}")
            nodes.append(node)
        outputs = [node.op == "output" for node in nodes]
        if not nodes or not outputs[-1] or sum(outputs) != 1:
            raise damaged("a graph without one output at its end")
        graph.lint()
        self._check_reads(graph, root)
        gm = build_graph_module(root, graph, checked_name(data["class_name"]))
        gm.training = data["training"]  # each module has its own
        gm.reports_nodes = True
        return gm

    def _check_reads(self, graph: Graph, root: dict[str, Any]) -> None:
        """Refuse calls and reads of what is not there, or must not be reached."""
        called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
        read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        inner = {t for t in read if lies_in(t, called)}
        if called | (read - inner) != set(root):
            raise damaged("a graph that uses other modules than it has")
        if any(isinstance(root[t], nn.Module) != (t in called) for t in root):
            raise damaged("a call of a tensor, or a read of a module")
        values = [root[t] for t in read - inner]
        for target in sorted(inner | {t for t in called if lies_in(t, called)}):
            parents = [t for t in called if target.startswith(f"{t}.")]
            owner = max(parents, key=len)
            path = target[len(owner) + 1 :]
            if target in called:
                if _at(root[owner], path) is not root[target]:
                    raise damaged(f"another module at {target!r} than its parent holds")
            else:
                value = self._inner_tensor(root[owner], path)
                if value is None:
                    raise damaged(f"a read of {target!r}, which is no tensor of a module")
                values.append(value)
        # An op could give it another shape, and recurrent kernels do not look.
        kept = {
            id(tensor)
            for target in called
            for part in root[target].modules()
            if isinstance(part, RECURRENT)
            for tensor in part.parameters(recurse=False)
        }
        if any(id(value) in kept for value in values):
            raise damaged("a read of the weight of a recurrent layer")

    def _inner_tensor(self, module: nn.Module, path: str) -> Tensor | None:
        """The parameter, the buffer or the float weight at `path` inside a module."""
        parent, _, name = path.rpartition(".")
        found = _at(module, parent) if parent else module
        if found is None:
            return None
        module = found
        if isinstance(module, QuantizedLayer):  # its packed memory is not to be reached
            known = {"weight": module.weight, "bias": module._buffers.get("bias")}
            return known.get(name)
        own = module._parameters.get(name)
        value = module._buffers.get(name) if own is None else own
        if value is None and type(module) in self.allowed_modules:
            value = vars(module).get(name)
        return value if isinstance(value, Tensor) else None

    def module(self, number: Any) -> nn.Module:
        """Rebuild the module of that number; the same number is the same object."""
        is_valid = type(number) is int and 0 <= number < len(self.descriptions)
        if not is_valid or number in self._open:
            raise damaged(f"a reference to module {number!r}")
        if number not in self._made:
            self._open.add(number)
            self._made[number] = self._module(self.descriptions[number])
            self._open.discard(number)
        return self._made[number]

    def check_all_used(self) -> None:
        """Raise a `LoadError` if the file has modules or tensors that nothing refers to."""
        if len(self._made) != len(self.descriptions):
            raise damaged("a module that nothing uses")
        self.reader.check_all_used()

    def _node(self, graph: Graph, entry: dict[str, Any], nodes: list[Node]) -> Node:
        op, name, target = entry["op"], checked_name(entry["name"]), entry["target"]
        args = decode(entry["args"], nodes, self.allowed, self.device)
        kwargs = decode(entry["kwargs"], nodes, self.allowed, self.device)
        if op not in NODE_KINDS or not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise damaged(f"a node of kind {op!r}")
        for key in kwargs:
            checked_name(key)
        is_call = op in ("call_function", "call_method")
        if op == "call_function":
            target = resolve_function(target, self.allowed)
        elif op == "call_method":
            check_method(target, LoadError)
        elif op in ("call_module", "get_attr"):
            checked_path(target)
        else:
            stars = len(target) - len(target.lstrip("*")) if op == "placeholder" else 0
            checked_name(target[min(stars, 2) :])
        if (op == "output" and (len(args) != 1 or kwargs)) or (op == "placeholder" and kwargs):
            raise damaged(f"the arguments of an {op}")
        if op == "placeholder" and (len(args) > 1 or any(isinstance(a, Node) for a in args)):
            raise damaged("the default of an input")
        if is_call and entry["target"] not in self.allowed:
            target, kwargs = written(target, kwargs)
        node = graph.create_node(op, target, args, kwargs, name=name)
        fault = fault_of_call(node) if is_call and entry["target"] not in self.allowed else None
        if fault is not None:
            raise damaged(f"{fault} (node {name})")
        node.meta.update({k: v for k, v in entry["meta"].items() if k in KEPT})
        return node

    def _module(self, data: dict[str, Any]) -> nn.Module:
        if "graph" in data:
            return self.graph(data["graph"])
        cls = resolve_class(data["class"], self.allowed_modules)
        if "description" in data:
            if cls is not DESCRIBED.get(data["class"]):
                raise damaged(f"a description of {data['class']}")
            tensors = {k: self.reader.tensor(r) for k, r in data["tensors"].items()}
            layer: nn.Module = cls.rebuild(decode(data["description"]), tensors)
            layer.training = data["training"]
            return layer
        parameters = {k: _parameter(self.reader.tensor(r)) for k, r in data["parameters"].items()}
        buffers = {k: self.reader.tensor(r) for k, r in data["buffers"].items()}
        own = (
            dict.fromkeys(data["empty"][0]) | parameters,
            dict.fromkeys(data["empty"][1]) | buffers,
        )
        children = {
            checked_child(key): None if child is None else self.module(child)
            for key, child in data["children"].items()
        }
        for key in (*own[0], *own[1]):
            checked_child(key)
        if "arguments" in data and cls not in self.allowed_modules:
            if data["class"] in DESCRIBED:
                raise damaged(f"arguments of {data['class']}")
            try:
                module = construct(cls, decode(data["arguments"]))
                module = fill(module, *own, children)
            except UnfitError as error:
                raise damaged(f"a {cls.__name__} with {error}") from error
        elif "attributes" in data and cls in self.allowed_modules:
            module = self._opaque(cls, data, own, children)
        else:
            raise damaged(f"a module of class {class_name(cls)} in another form")
        module.training = data["training"]
        return module

    def _opaque(
        self,
        cls: type[nn.Module],
        data: dict[str, Any],
        own: tuple[dict[str, Any], dict[str, Any]],
        children: dict[str, Any],
    ) -> nn.Module:
        """A module of a class that the caller allows, put together without its constructor."""
        module: nn.Module = cls.__new__(cls)
        nn.Module.__init__(module)
        for key, value in data["attributes"].items():
            made = LeftOut(value["left_out"]) if "left_out" in value else decode(
                value["value"], (), self.allowed, self.device
            )  # fmt: skip
            vars(module)[_attribute_name(cls, key)] = made
        for key, reference in data["tensors"].items():
            vars(module)[_attribute_name(cls, key)] = self.reader.tensor(reference)
        module._parameters.update(own[0])
        module._buffers.update(own[1])
        module._non_persistent_buffers_set.update(data["transient"])
        module._modules.update(children)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
        return module


def checked_name(name: Any) -> str:
    """`name` if it can be part of generated code, else a `LoadError`."""
    if not is_name(name):
        raise damaged(f"the name {name!r:.80}")
    return str(name)


def checked_path(path: Any) -> str:
    """`path` if each of its parts is a name or a number, else a `LoadError`."""
    for part in str(path).split("."):
        if part.startswith("__") and part.endswith("__"):
            raise damaged(f"the path {path!r:.80}")
        # Numbers and a leading underscore are fine: `is_name` of the part behind a letter.
        if not part or part in RESERVED or iskeyword(part) or not is_name(f"a{part}"):
            raise damaged(f"the path {path!r:.80}")
    return str(path)


def checked_child(key: Any) -> str:
    """The user's name of a child or a tensor: data, which no generated code holds."""
    if not isinstance(key, str) or "." in key or key.startswith("__"):
        raise damaged(f"the name {key!r:.80} of a child")
    return key


def damaged(found: str) -> LoadError:
    """The error for data that fxquant did not write."""
    return LoadError(
        "saved graph",
        found=found,
        needed="a graph that fxquant wrote",
        remedy="The file is damaged or hostile: save the model again.",
    )


def _at(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, or None."""
    found: nn.Module | None = module
    for part in path.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def _attribute_name(cls: type, key: Any) -> str:
    name = checked_name(key)
    if hasattr(_BARE, name) or callable(getattr(cls, name, None)):
        raise damaged(f"the attribute {name!r} of {class_name(cls)}")
    return name


def _parameter(tensor: Tensor) -> nn.Parameter:
    if not isinstance(tensor, nn.Parameter):
        raise damaged("a parameter that is stored as a plain tensor")
    return tensor
