"""Fuse inside a model of the user's class: parts whose code is a plain function of one tensor.

before: `y = self.down(silu(self.gate(x)) * self.up(x))` in the forward of `mlp`, a part
after:  `mlp` is a graph that computes `y = self.down(self.gate_up(x))`
"""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, Tracer

from fxquant.errors import SaveError, check_type
from fxquant.fusion.fuse import fuse
from fxquant.fusion.fused import fused_counts
from fxquant.graph.copying import copy_owning_tensors, copy_sharing_tensors
from fxquant.graph.graph_module import FxquantGraph
from fxquant.graph.layers import has_hooks
from fxquant.graph.left_alone import process_left_alone, structure_left_alone
from fxquant.modules.layer import QuantizedLayer
from fxquant.numerics.metrics import sqnr_db

M = TypeVar("M", bound=nn.Module)
FUSED_PARTS = "fxquant_fused"
LEAST_DB = 40.0  # of a fused part against the part, in bfloat16
_SAVING = ("save_pretrained", "push_to_hub")


def fuse_modules(model: M, *, share_memory: bool = False) -> M:
    """A copy of `model` in which parts compute the same in fewer and larger steps.

    A part is fused where its forward takes one tensor and `torch.fx` can trace it: the MLP of a
    language model, or its norms. It becomes a graph with the patterns of `fuse`, if there are any
    in it, and if that graph computes on random inputs what the part does. What has more arguments,
    or runs code on values, keeps its own code, and its parts are tried. Outputs agree within the
    rounding of the dtype. The copy is made for running: it is not saved again.

    Args:
        model: what `swap_modules` or `from_pretrained` gave, on the CPU and in evaluation mode; it
            is not changed.
        share_memory: let what is not fused lie in the memory of `model`.

    Returns:
        A copy of the same class. Its `fxquant_fused` says by name what was fused in which part:
        `{"model.layers.0.mlp": {"gate": 1}}`.

    Raises:
        OptionError: `model` is no module.
    """
    check_type("fuse_modules", model, nn.Module, "Pass what swap_modules returned.")
    copied = copy_sharing_tensors if share_memory else copy_owning_tensors
    made: M = copied(model)
    fused: dict[str, dict[str, int]] = {}
    graphs: dict[nn.Module, FxquantGraph | None] = {}
    with process_left_alone(), torch.no_grad():
        for parent, key, name in list(_places(made)):
            if any(name.startswith(f"{other}.") for other in fused):
                continue
            part = parent._modules[key]
            assert part is not None  # places have modules
            if part not in graphs:
                graphs[part] = _fused(part)
            graph = graphs[part]
            if graph is not None:
                parent._modules[key] = graph
                fused[name] = fused_counts(graph)
    setattr(made, FUSED_PARTS, fused)
    if fused:
        _guard_saving(made)
    return made


def _places(model: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str, str]]:
    """Each child module as its parent, its key there and its name; parents before children."""
    for key, child in model._modules.items():  # a shared child at each of its places
        if child is not None:
            yield model, key, f"{prefix}{key}"
            yield from _places(child, f"{prefix}{key}.")


class _PartTracer(Tracer):
    """Takes quantized layers, and modules of torch, as one step."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether a module is one step."""
        return isinstance(module, QuantizedLayer) or super().is_leaf_module(module, qualified_name)


def _fused(part: nn.Module) -> FxquantGraph | None:
    """A graph with fused steps that computes what a part does, or None."""
    if isinstance(part, QuantizedLayer) or not _is_function_of_one(part):
        return None
    inputs = _inputs(part)
    with structure_left_alone(part):
        graph = _traced(part) if inputs is not None else None
        if graph is None or inputs is None:
            return None
        plain = FxquantGraph(part, graph, type(part).__name__)
        expected = _output(part, inputs)
        found = _output(plain, inputs)
        if expected is None or found is None or not torch.equal(expected, found):
            return None
        fused = fuse(plain, share_memory=True)
        if not fused_counts(fused):
            return None
        found = _output(fused, inputs)
    if found is None or found.dtype != expected.dtype or found.shape != expected.shape:
        return None
    assert isinstance(fused, FxquantGraph)  # for type checkers
    return fused if sqnr_db(expected, found) >= LEAST_DB else None


def _is_function_of_one(part: nn.Module) -> bool:
    """Whether the forward is that of its class, for evaluation, without hooks, of one argument."""
    parts = list(part.modules())
    if any(p.training or has_hooks(p) or "forward" in vars(p) for p in parts):
        return False
    if isinstance(part, torch.jit.ScriptModule | FxquantGraph):
        return False
    arguments = list(inspect.signature(type(part).forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(arguments) == 1 and arguments[0].kind in kinds


def _inputs(part: nn.Module) -> Tensor | None:
    """Random values that the part takes, or None: [2, 3, width] of a width of its layers."""
    tensors = [*part.parameters(), *(b for b in part.buffers() if b.is_floating_point())]
    if any(not t.is_cpu for t in (*part.parameters(), *part.buffers())):
        return None
    layers = [m for m in part.modules() if isinstance(m, QuantizedLayer)]
    widths = [layer.weight_shape[-1] for layer in layers]
    widths += [t.shape[-1] for t in tensors if t.ndim]
    dtypes = [t.dtype for t in tensors] + [layer.weight.dtype for layer in layers]
    generator = torch.Generator().manual_seed(0)
    for width in dict.fromkeys(widths):
        x = torch.randn(2, 3, width, generator=generator).to(dtypes[0])
        if _output(part, x) is not None:
            return x
    return None


def _output(module: nn.Module, x: Tensor) -> Tensor | None:
    """The tensor that a module gives; None where it gives something else, or raises."""
    try:
        y = module(x.clone())
    except Exception:  # the user's code may raise anything where inputs do not fit
        return None
    return y if isinstance(y, Tensor) else None


def _traced(part: nn.Module) -> Graph | None:
    """The graph of the part's code; None where it cannot be traced, or changes attributes."""
    before = [(m, dict(vars(m))) for m in part.modules()]
    try:
        graph = _PartTracer().trace(part)
    except Exception:  # the user's code, with values that are not there
        return None
    is_same = all(
        vars(m).keys() == values.keys() and all(vars(m)[k] is v for k, v in values.items())
        for m, values in before
    )
    return graph if is_same else None


def _guard_saving(model: nn.Module) -> None:
    for part in model.modules():
        for name in _SAVING:
            if hasattr(type(part), name):
                vars(part)[name] = partial(_refuse, f"{type(part).__name__}.{name}")


def _refuse(where: str, *args: Any, **kwargs: Any) -> None:
    raise SaveError(
        where,
        found="a model with fused parts",
        needed="the model as it was before fuse_modules",
        remedy="Save that one, and call fuse_modules again after it is loaded.",
    )
