"""Plain data into graphs and modules. The data is not trusted.

Every name is checked before it becomes part of generated code, every target is resolved on the
allow-list, and no constructor runs: attributes, parameters and children are put in place.
"""

import keyword
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxquant.errors import LoadError
from fxquant.graph.shapes import KEPT
from fxquant.serialization.allowlist import (
    ATTRIBUTES,
    check_method,
    class_name,
    resolve_class,
    resolve_function,
)
from fxquant.serialization.describe import DESCRIBED, INTERNAL, lies_in
from fxquant.serialization.tensor_store import TensorReader
from fxquant.serialization.values import decode

OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")


class Rebuilder:
    """Rebuilds the graphs and modules of one file."""

    def __init__(
        self,
        modules: list[dict[str, Any]],
        reader: TensorReader,
        allowed: tuple[str, ...],
        allowed_modules: tuple[type[nn.Module], ...],
    ) -> None:
        self.descriptions, self.reader = modules, reader
        self.allowed, self.allowed_modules = allowed, allowed_modules
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
        graph, nodes = Graph(), dict[str, Node]()
        for entry in data["nodes"]:
            node = self._node(graph, entry, nodes)
            if node.name != entry["name"]:
                raise damaged(f"the node name {entry['name']!r}")
            nodes[node.name] = node
        graph.lint()
        called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
        read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        if called | {t for t in read if not lies_in(t, called)} != set(root):
            raise damaged("a graph that uses other modules than it has")
        for target in sorted(read - set(root)):
            owner = next(t for t in called if target.startswith(f"{t}."))
            value: Any = root[owner]
            for part in target[len(owner) + 1 :].split("."):
                value = getattr(value, part)
            if not isinstance(value, Tensor):
                raise damaged(f"a read of {target!r}, which is no tensor")
            root[target] = value
        gm = GraphModule(root, graph, checked_name(data["class_name"]))
        gm.training = bool(data["training"])  # each module has its own
        return gm

    def module(self, number: Any) -> nn.Module:
        """Rebuild the module of that number; the same number is the same object."""
        is_valid = isinstance(number, int) and 0 <= number < len(self.descriptions)
        if not is_valid or number in self._open:
            raise damaged(f"a reference to module {number!r}")
        if number not in self._made:
            self._open.add(number)
            self._made[number] = self._module(self.descriptions[number])
            self._open.discard(number)
        return self._made[number]

    def _node(self, graph: Graph, entry: dict[str, Any], nodes: dict[str, Node]) -> Node:
        op, name, target = entry["op"], checked_name(entry["name"]), entry["target"]
        args = decode(entry["args"], nodes, self.allowed)
        kwargs = decode(entry["kwargs"], nodes, self.allowed)
        if op not in OPS or not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise damaged(f"a node of kind {op!r}")
        for key in kwargs:
            checked_name(key)
        if op == "call_function":
            target = resolve_function(target, self.allowed)
            if target is getattr and (len(args) != 2 or args[1] not in ATTRIBUTES):
                raise damaged(f"a read of the attribute {args[1:]!r}")
        elif op == "call_method":
            check_method(target, LoadError)
        elif op in ("call_module", "get_attr"):
            checked_path(target)
        else:
            checked_name(target)
        node = graph.create_node(op, target, args, kwargs, name=name)
        node.meta.update({k: v for k, v in entry["meta"].items() if k in KEPT})
        return node

    def _module(self, data: dict[str, Any]) -> nn.Module:
        if "graph" in data:
            return self.graph(data["graph"])
        cls = resolve_class(data["class"], self.allowed_modules)
        if cls in DESCRIBED:
            tensors = {k: self.reader.tensor(r) for k, r in data["tensors"].items()}
            return cls.rebuild(decode(data["description"], {}), tensors).eval()
        module: nn.Module = cls.__new__(cls)
        nn.Module.__init__(module)
        for key, value in data["attributes"].items():
            vars(module)[_attribute_name(cls, key)] = decode(value, {}, self.allowed)
        for key, reference in data["tensors"].items():
            vars(module)[_attribute_name(cls, key)] = self.reader.tensor(reference)
        for key, reference in data["parameters"].items():
            module.register_parameter(checked_name(key), _parameter(self.reader.tensor(reference)))
        for key, reference in data["buffers"].items():
            is_persistent = key not in data["transient"]
            module.register_buffer(checked_name(key), self.reader.tensor(reference), is_persistent)
        for key in data["empty"]:
            module.register_parameter(checked_name(key), None)
        for key, child in data["children"].items():
            module._modules[_child_name(key)] = self.module(child)
        for key in data["no_child"]:
            module._modules[_child_name(key)] = None
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
        module.training = bool(data["training"])
        return module


def checked_name(name: Any) -> str:
    """`name` if it can be part of generated code, else a `LoadError`."""
    is_text = isinstance(name, str) and name.isascii() and not keyword.iskeyword(name)
    if not is_text or not name.replace("_", "a").isalnum() or name.startswith("__"):
        raise damaged(f"the name {name!r}")
    return str(name)


def checked_path(path: Any) -> str:
    """`path` if each of its parts is a name, else a `LoadError`."""
    for part in str(path).split("."):
        checked_name(part)
    return str(path)


def damaged(found: str) -> LoadError:
    """The error for data that fxquant did not write."""
    return LoadError(
        "saved graph",
        found=found,
        needed="a graph that fxquant wrote",
        remedy="The file is damaged or hostile: save the model again.",
    )


def _child_name(key: Any) -> str:
    """The user's name of a child: data, which no generated code holds."""
    if not isinstance(key, str) or not key or "." in key or key.startswith("__"):
        raise damaged(f"the name {key!r} of a child")
    return key


def _attribute_name(cls: type, key: Any) -> str:
    name = checked_name(key)
    if name in INTERNAL or callable(getattr(cls, name, None)):
        raise damaged(f"the attribute {name!r} of {class_name(cls)}")
    return name


def _parameter(tensor: Tensor) -> nn.Parameter:
    if not isinstance(tensor, nn.Parameter):
        raise damaged("a parameter that is stored as a plain tensor")
    return tensor
