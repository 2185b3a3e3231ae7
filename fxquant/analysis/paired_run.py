"""Run a float and a quantized model on the same input and compare them layer by layer.

For a layer F, its quantized form F_q, its float input x and the input x_q it sees in the quantized
model, the error at its output splits into two parts:

    F_q(x_q) − F(x)  =  [F_q(x_q) − F(x_q)]  +  [F(x_q) − F(x)]
        cumulative          introduced             arrived
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph.scopes import sites
from fxquant.graph.structures import main_output
from fxquant.modules.linear import QuantizedLinear
from fxquant.numerics.metrics import SqnrMeter

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class LayerErrors:
    """The meters of one layer, each of F_q(x_q) or F(x_q) against the float result."""

    introduced: SqnrMeter = field(default_factory=SqnrMeter)
    arrived: SqnrMeter = field(default_factory=SqnrMeter)
    cumulative: SqnrMeter = field(default_factory=SqnrMeter)


@dataclass(frozen=True)
class PairedRun:
    """Errors by layer name, and of the model's output."""

    layers: dict[str, LayerErrors]
    output: SqnrMeter


@torch.no_grad()
def run_paired(
    float_gm: GraphModule,
    quantized_gm: GraphModule,
    calls: Iterable[Call],
    select: Callable[[Any], Tensor] = main_output,
) -> PairedRun:
    """Compare two graphs of the same model.

    Args:
        float_gm: the traced model.
        quantized_gm: the same graph with quantized layers; nodes have the same names.
        calls: `(args, kwargs)` of each batch.
        select: picks the tensor of the model's output that is compared.

    Returns:
        Signal and noise of every quantized layer that ran, and of the output. It costs the float
        pass, the quantized pass, and every quantized layer once more in float.
    """
    pairs = _layer_pairs(float_gm, quantized_gm)
    run = PairedRun({name: LayerErrors() for name, _, _ in pairs}, SqnrMeter())
    for args, kwargs in calls:
        results: dict[str, list[Tensor]] = {name: [] for name, _, _ in pairs}
        with _hooks([(f, _record(results[name])) for name, f, _ in pairs]):
            expected = select(float_gm(*args, **kwargs))
        with _hooks(
            [(q, _compare(f, iter(results[name]), run.layers[name])) for name, f, q in pairs]
        ):
            found = select(quantized_gm(*args, **kwargs))
        run.output.add(expected, found)
    return run


def _layer_pairs(
    float_gm: GraphModule, quantized_gm: GraphModule
) -> list[tuple[str, nn.Linear, QuantizedLinear]]:
    linears = {s.name: s.module for s in sites(float_gm) if isinstance(s.module, nn.Linear)}
    found = {}
    for site in sites(quantized_gm):
        if isinstance(site.module, QuantizedLinear) and site.name in linears:
            found[site.name] = (site.name, linears[site.name], site.module)
    return list(found.values())


def _record(results: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        results.append(output)

    return hook


def _compare(linear: nn.Linear, expected: Iterator[Tensor], errors: LayerErrors) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        clean = next(expected)  # F(x)
        shifted = linear(args[0])  # F(x_q)
        errors.introduced.add(shifted, output)
        if clean.shape == output.shape:  # control flow may have taken another way
            errors.arrived.add(clean, shifted)
            errors.cumulative.add(clean, output)

    return hook


@contextmanager
def _hooks(hooks: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
