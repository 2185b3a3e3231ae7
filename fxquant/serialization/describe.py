"""Graphs and modules into plain data. Nothing is pickled: what cannot be described is refused."""

import keyword
import re
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from fxquant.errors import SaveError
from fxquant.graph.layers import tensor_attribute
from fxquant.graph.saved_ops import ATTRIBUTES, fault_of_call
from fxquant.graph.shapes import KEPT
from fxquant.graph.structures import named_result
from fxquant.serialization.allowlist import DESCRIBED, check_method, function_name
from fxquant.serialization.layer_table import left_out
from fxquant.serialization.layers import (
    INTERNAL,
    UnfitError,
    arguments_of,
    class_name,
    construct,
    difference,
    known_classes,
)
from fxquant.serialization.tensor_store import TensorWriter
from fxquant.serialization.values import encode

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def is_name(name: Any) -> bool:
    """Whether `name` can be part of generated code and means nothing to Python."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return False
    return not keyword.iskeyword(name) and not name.startswith("__")


def lies_in(target: str, called: set[str]) -> bool:
    """Whether the tensor at `target` belongs to a module that a node calls."""
    parts = target.split(".")
    return any(".".join(parts[:n]) in called for n in range(1, len(parts)))


class Describer:
    """Describes graphs and the modules they call; shared modules are described once."""

    def __init__(self, allowed: tuple[str, ...], allowed_modules: tuple[type, ...]) -> None:
        self.allowed, self.allowed_modules = allowed, allowed_modules
        self.writer = TensorWriter()
        self.modules: list[dict[str, Any]] = []
        self._numbers: dict[nn.Module, int] = {}

    def graph(self, gm: GraphModule, path: str = "") -> dict[str, Any]:
        """Describe a graph; the modules and tensors it uses go to the lists of this object.

        Raises:
            SaveError: a node, a module or a value cannot be described.
        """
        _check_plain(gm, path or "model")
        if type(gm.graph._codegen) is not CodeGen:
            raise SaveError(
                path or "model",
                found="a graph with flattened inputs and outputs",
                needed="a plain graph",
                remedy="Trace the model with fxquant.trace.",
            )
        targets: dict[str, int] = {}
        attributes: dict[str, Any] = {}
        nodes = []
        numbers = {node: number for number, node in enumerate(gm.graph.nodes)}
        called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
        for node in gm.graph.nodes:
            where = f"node {node.name}"
            target = str(node.target)
            full = f"{path}.{target}" if path else target
            if node.op == "call_module":
                targets[target] = self.module(gm.get_submodule(target), full)
            elif node.op == "get_attr" and not lies_in(target, called):
                attributes[target] = self._attribute(tensor_attribute(gm, node), full)
            nodes.append(
                {
                    "op": node.op,
                    "name": node.name if is_name(node.name) else f"node_{numbers[node]}",
                    "target": self._target(node, where),
                    "args": encode(tuple(node.args), where, self.allowed, numbers),
                    "kwargs": encode(dict(node.kwargs), where, self.allowed, numbers),
                    "meta": {k: node.meta[k] for k in KEPT if k in node.meta},
                }
            )
        name = type(gm).__name__
        return {
            "class_name": name if is_name(name) else "Graph",
            "nodes": nodes,
            "modules": targets,
            "attributes": attributes,
            "training": gm.training,
        }

    def module(self, module: nn.Module, path: str) -> int:
        """Describe a module and return its number."""
        if module not in self._numbers:
            self._numbers[module] = len(self.modules)
            self.modules.append({})
            self.modules[self._numbers[module]] = self._describe(module, path)
        return self._numbers[module]

    def _describe(self, module: nn.Module, path: str) -> dict[str, Any]:
        if isinstance(module, GraphModule):
            return {"graph": self.graph(module, path)}
        name = class_name(type(module))
        is_known = type(module) in (known_classes().get(name), DESCRIBED.get(name))
        if is_known or type(module) in self.allowed_modules:
            _check_plain(module, path)
        if type(module) is DESCRIBED.get(name):
            described: Any = module
            return {
                "class": name,
                "description": encode(described.describe(), path),
                "tensors": self._references(described.saved_tensors(), path),
                "training": module.training,
            }
        if type(module) in self.allowed_modules:
            return {**self._state(module, path), **self._opaque(module, path), "class": name}
        if type(module) is not known_classes().get(name):
            reason = left_out(type(module)) or "it could not be traced (see trace_report)"
            raise SaveError(
                path,
                found=f"an opaque module of class {name}",
                needed="a module that a file may hold",
                remedy=f"This one may not: {reason}. If its class can be imported where the file "
                f"is loaded, pass allow_modules=({type(module).__name__},).",
            )
        arguments: dict[str, Any] = {}
        try:
            arguments = arguments_of(module)
            fault = difference(construct(type(module), arguments), module)
        except (UnfitError, AttributeError, IndexError, TypeError) as error:
            fault = str(error)
        if fault is not None:
            raise SaveError(
                path,
                found=f"a {type(module).__name__} that its constructor does not make: {fault}",
                needed="a module whose attributes and tensors its constructor made",
                remedy="Give the module a class of its own, and pass allow_modules=(TheClass,).",
            )
        described = encode(arguments, path)
        return {**self._state(module, path), "class": name, "arguments": described}

    def _state(self, module: nn.Module, path: str) -> dict[str, Any]:
        """Tensors, children and mode, which every module has."""
        groups = (module._parameters, module._buffers)
        parameters, buffers = ({k: v for k, v in g.items() if v is not None} for g in groups)
        return {
            "parameters": self._references(parameters, path),
            "buffers": self._references(buffers, path),
            "empty": [[k for k, v in group.items() if v is None] for group in groups],
            "children": {
                k: None if child is None else self.module(child, f"{path}.{k}")
                for k, child in module._modules.items()
            },
            "training": module.training,
        }

    def _opaque(self, module: nn.Module, path: str) -> dict[str, Any]:
        """What else a module of a class that the caller allows holds."""
        attributes, tensors = {}, {}
        for key, value in vars(module).items():
            if key in INTERNAL or key in ("_flat_weights", "_flat_weight_refs"):
                continue
            where = f"{path}.{key}"
            if isinstance(value, Tensor):
                tensors[key] = self.writer.reference(value, where)
                continue
            try:
                attributes[key] = {"value": encode(value, where, self.allowed)}
            except SaveError:  # left out by name: it may not be needed
                attributes[key] = {"left_out": f"{where} ({class_name(type(value))})"}
        return {
            "attributes": attributes,
            "tensors": tensors,
            "transient": sorted(module._non_persistent_buffers_set),
        }

    def _references(self, tensors: dict[str, Any], path: str) -> dict[str, Any]:
        return {k: self.writer.reference(t, f"{path}.{k}") for k, t in tensors.items()}

    def _attribute(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Tensor):
            return self.writer.reference(value, path)
        raise SaveError(
            path,
            found=f"an attribute of type {type(value).__name__}",
            needed="a tensor",
            remedy="Register it as a buffer.",
        )

    def _target(self, node: Node, where: str) -> str:
        target: Any = node.target
        if target is getattr and node.args[1] not in ATTRIBUTES:
            target = named_result  # an output of a module, by its name
        name = str(target)
        if node.op == "call_function":
            name = function_name(target, where, self.allowed)
        elif node.op == "call_method":
            check_method(name, SaveError)
        if node.op in ("call_function", "call_method") and target is node.target:
            fault = None if name in self.allowed else fault_of_call(node)
            if fault is not None:
                raise SaveError(
                    where,
                    found=fault,
                    needed="arguments that a file may hold",
                    remedy="Rewrite this step of the model with a torch function.",
                )
        return name


def _check_plain(module: nn.Module, path: str) -> None:
    if module._forward_hooks or module._forward_pre_hooks:
        raise SaveError(
            path,
            found="forward hooks",
            needed="a module without hooks",
            remedy="Remove the hooks before saving; they are code.",
        )
    if "forward" in vars(module):
        raise SaveError(
            path,
            found="a forward function of its own",
            needed="a module that computes what its class says",
            remedy="Give the module a class of its own, and pass allow_modules=(TheClass,).",
        )
