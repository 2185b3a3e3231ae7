"""A model whose inputs and outputs are tensors in a row, as torch.export and ONNX want them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxquant.errors import OptionError, SaveError
from fxquant.graph.calls import Call
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.shapes import DTYPE, SHAPE
from fxquant.graph.structures import named_fields, tensors_in


class FlatModule(nn.Module):
    """Runs `model` on the tensors of a call, and gives its output's tensors.

    Args:
        model: any module.
        call: says where the tensors belong, and the values of all other arguments.

    Attributes:
        input_names: of the call's tensors, in order.
        output_names: of the tensors in what the model returns for the call.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        leaves, self._spec = pytree.tree_flatten((call.args, call.kwargs))
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.input_names = _input_names(model, call)
        self.output_names = _output_names(call.run(model))

    @classmethod
    def with_layers(
        cls, model: nn.Module, call: Call, make: Callable[[nn.Module], nn.Module | None]
    ) -> "FlatModule":
        """Run a copy of `model`, in evaluation mode, with other modules in the place of some.

        Args:
            model: is not changed; the copy shares its tensors.
            call: as above.
            make: gives what stands in the place of a module; None: the module itself.
        """
        flat = cls(model, call)
        found = list(flat.named_modules(remove_duplicate=False))
        flat.model = copy_sharing_tensors(model, frozen=True)
        made: dict[int, nn.Module | None] = {}
        for path, module in found:
            if id(module) not in made:
                made[id(module)] = make(module)
            replacement = made[id(module)]
            if replacement is not None:
                flat.set_submodule(path, replacement)
        return flat.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The output's tensors in order."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return tuple(tensors_in(self.model(*args, **kwargs)))


def open_sizes(call: Call) -> dict[str, Any]:
    """`dynamic_shapes` for torch's exporters: all sizes that the model leaves open stay open."""
    tensors = call.tensors()
    sizes = [dict.fromkeys(range(tensor.ndim), torch.export.Dim.AUTO) for tensor in tensors]
    return {"tensors": tuple(sizes)}


def example_call(model: nn.Module, example_inputs: object) -> Call:
    """The call to export `model` with: the caller's, or one of the shapes that a graph remembers.

    Raises:
        OptionError: there is neither.
    """
    if example_inputs is not None:
        return Call.of(example_inputs)
    if isinstance(model, GraphModule):
        inputs = [node for node in model.graph.nodes if node.op == "placeholder"]
        known = [node for node in inputs if SHAPE in node.meta and DTYPE in node.meta]
        required = [node for node in inputs if not node.args]
        if known and set(required) <= set(known):
            return Call((), {str(node.target): _ones(node.meta) for node in known})
    raise OptionError(
        "example_inputs",
        found="nothing, and a model that does not remember the shapes of its inputs",
        needed="the arguments of one call",
        remedy="Pass example_inputs=, a tensor, a tuple or a mapping.",
    )


def not_exportable(format: str, error: BaseException) -> SaveError:
    """The error for a model of which torch's exporter raised `error`; it has the first reason."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    reason = str(first).strip().partition("\n")[0]
    return SaveError(
        f"export to {format}",
        found=f"a model that torch.export cannot take: {type(first).__name__}: {reason:.300}",
        needed="a graph of tensor operations",
        remedy="Export the graph that fxquant.quantize returned; trace_report(graph) lists modules "
        "that could not be traced. Or pass other example_inputs, or dynamic=False.",
    )


def _ones(meta: dict[str, Any]) -> Tensor:
    return torch.ones(meta[SHAPE], dtype=getattr(torch, meta[DTYPE]))


def _input_names(model: nn.Module, call: Call) -> list[str]:
    """The names of the arguments; of tensors inside containers, with their places."""
    parameters = _parameter_names(model)
    names = []
    for path, leaf in pytree.tree_leaves_with_path((call.args, call.kwargs)):
        if not isinstance(leaf, Tensor):
            continue
        first, *rest = path[1:]
        place: int | None = getattr(first, "idx", None)
        if place is None:
            name = str(getattr(first, "key", first))
        else:
            name = parameters[place] if place < len(parameters) else f"input_{place}"
        names.append("_".join([name, *(_part(key) for key in rest)]))
    return names


def _parameter_names(model: nn.Module) -> list[str]:
    if isinstance(model, GraphModule):
        return [str(node.target) for node in model.graph.nodes if node.op == "placeholder"]
    code = type(model).forward.__code__
    return list(code.co_varnames[1 : code.co_argcount])


def _part(key: Any) -> str:
    return str(getattr(key, "idx", getattr(key, "key", getattr(key, "name", key))))


def _output_names(output: object, prefix: str = "") -> list[str]:
    if isinstance(output, Tensor):
        return [prefix or "output"]
    fields: Any = named_fields(output)
    if fields is None and isinstance(output, tuple | list):
        fields = dict(enumerate(output))
    elif fields is None:
        fields = output if isinstance(output, dict) else {}
    names = []
    for key, value in fields.items():
        start = str(key) if isinstance(key, str) else f"output_{key}"
        names += _output_names(value, f"{prefix}_{key}" if prefix else start)
    return names
