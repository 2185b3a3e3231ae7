"""Graphs and modules into plain data. Nothing is pickled: what cannot be described is refused."""

from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from fxquant.errors import SaveError
from fxquant.graph.layers import tensor_attribute
from fxquant.graph.shapes import KEPT
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.modules.linear_int8 import QuantizedLinearInt8
from fxquant.serialization.allowlist import (
    ATTRIBUTES,
    check_method,
    class_name,
    function_name,
    module_classes,
)
from fxquant.serialization.tensor_store import TensorWriter
from fxquant.serialization.values import encode

INTERNAL = frozenset(vars(nn.Module())) | {"training"}
# Attributes that a module makes again by itself.
DERIVED = {nn.RNNBase: ("_flat_weights", "_flat_weight_refs")}
DESCRIBED = (QuantizedLinearInt4, QuantizedLinearInt8)


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
                    "name": node.name,
                    "target": self._target(node, where),
                    "args": encode(tuple(node.args), where, self.allowed),
                    "kwargs": encode(dict(node.kwargs), where, self.allowed),
                    "meta": {k: node.meta[k] for k in KEPT if k in node.meta},
                }
            )
        return {
            "class_name": type(gm).__name__ if type(gm).__name__.isidentifier() else "Graph",
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
        is_known = name in module_classes() or type(module) in self.allowed_modules
        if not is_known:
            raise SaveError(
                path,
                found=f"an opaque module of class {name}",
                needed="torch.nn's or fxquant's own modules",
                remedy="It could not be traced (see trace_report). If its class can be imported "
                f"where the file is loaded, pass allow_modules=({type(module).__name__},).",
            )
        if isinstance(module, DESCRIBED):
            tensors = module.saved_tensors()
            return {
                "class": name,
                "description": encode(module.describe(), path),
                "tensors": {k: self.writer.reference(t, f"{path}.{k}") for k, t in tensors.items()},
            }
        return self._generic(module, name, path)

    def _encode_attribute(self, value: Any, where: str, owner: nn.Module) -> Any:
        """An attribute; what an opaque module holds beside plain data is left out by name."""
        try:
            return encode(value, where, self.allowed)
        except SaveError:
            if type(owner) in self.allowed_modules:
                return {"left_out": f"{where} ({class_name(type(value))})"}
            raise

    def _generic(self, module: nn.Module, name: str, path: str) -> dict[str, Any]:
        if module._forward_hooks or module._forward_pre_hooks:
            raise SaveError(
                path,
                found="forward hooks",
                needed="a module without hooks",
                remedy="Remove the hooks before saving; they are code.",
            )
        derived = {n for cls, names in DERIVED.items() if isinstance(module, cls) for n in names}
        attributes, tensors = {}, {}
        for key, value in vars(module).items():
            if key in INTERNAL or key in derived:
                continue
            if isinstance(value, Tensor):
                tensors[key] = self.writer.reference(value, f"{path}.{key}")
            else:
                attributes[key] = self._encode_attribute(value, f"{path}.{key}", module)
        buffers = {k: v for k, v in module._buffers.items() if v is not None}
        parameters = {k: v for k, v in module._parameters.items() if v is not None}
        return {
            "class": name,
            "attributes": attributes,
            "tensors": tensors,
            "parameters": self._references(parameters, path),
            "buffers": self._references(buffers, path),
            "empty": [
                k for group in (module._parameters, module._buffers) for k, v in group.items()
                if v is None
            ],
            "transient": sorted(module._non_persistent_buffers_set),
            "children": {
                k: self.module(child, f"{path}.{k}")
                for k, child in module._modules.items()
                if child is not None
            },
            "no_child": [k for k, child in module._modules.items() if child is None],
            "training": module.training,
        }  # fmt: skip

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
        if node.op == "call_function":
            if node.target is getattr and node.args[1] not in ATTRIBUTES:
                raise SaveError(
                    where,
                    found=f"the attribute {node.args[1]!r}",
                    needed=f"one of {sorted(ATTRIBUTES)}",
                    remedy="Compute it with a torch function.",
                )
            return function_name(node.target, where, self.allowed)
        if node.op == "call_method":
            check_method(str(node.target), SaveError)
        return str(node.target)
