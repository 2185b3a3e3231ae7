"""Quantize layer by layer, each on the inputs that the quantized layers before it produce.

The float and the quantized graph run side by side over all batches. Where a layer is reached, its
inputs in both are at hand: their moments choose the integers, the layer is swapped, and the run
goes on through the swapped layer. Layers inside an opaque module are quantized together, before the
run goes on through that module.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.algorithms.moments import InputMoments
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.scopes import Site, sites
from fxquant.graph.stepper import Call, Stepper
from fxquant.modules.linear import QuantizedLinear
from fxquant.passes.decide import Decision

QuantizeWithMoments = Callable[[str, nn.Linear, int, InputMoments], QuantizedLinear]
PADDING_MASK = "attention_mask"


@dataclass(frozen=True)
class _Batch:
    """One batch on its way through both graphs."""

    clean: Stepper
    noisy: Stepper
    clean_values: dict[Node, Any]
    noisy_values: dict[Node, Any]
    mask: Tensor | None


@torch.no_grad()
def quantize_sequentially(
    gm: GraphModule,
    decisions: Iterable[Decision],
    calls: Sequence[Call],
    quantize_linear: QuantizeWithMoments,
) -> GraphModule:
    """Swap each Linear that the ledger quantizes, in the order in which it runs.

    Args:
        gm: a traced model; it is not changed.
        decisions: the ledger.
        calls: batches as `(args, kwargs)`. A two-dimensional `attention_mask` among the keyword
            arguments masks padding out of the moments.
        quantize_linear: makes a quantized layer from `(name, linear, bits, moments)`; layers that
            no batch reaches get moments without tokens.

    Returns:
        A new graph whose nodes have the same names.
    """
    bits = {d.module: d.bits for d in decisions if d.bits is not None}
    rewritten = copy_sharing_tensors(gm, frozen=True)
    float_gm = copy_sharing_tensors(gm, frozen=True)
    pending = _sites_by_root(rewritten, bits)
    partners = {site.name: site.module for site in sites(float_gm)}
    batches = [_start(float_gm, rewritten, call) for call in calls]
    for index, node in enumerate(rewritten.graph.nodes):
        layers = pending.get(node, [])
        moments = {s.name: InputMoments(s.module.in_features) for s in layers}
        for batch in batches:
            clean_node = batch.clean.nodes[index]
            with _watching(layers, partners, moments, batch.mask):
                batch.clean_values[clean_node] = batch.clean.compute(clean_node, batch.clean_values)
                if layers:  # in float still, to see what arrives
                    batch.noisy.compute(node, batch.noisy_values)
        for site in layers:
            if isinstance(site.module, nn.Linear):
                made = quantize_linear(site.name, site.module, bits[site.name], moments[site.name])
                _swap(rewritten, site, made.eval())
        for batch in batches:
            batch.noisy_values[node] = batch.noisy.compute(node, batch.noisy_values)
            batch.clean.free(batch.clean_values, index + 1)
            batch.noisy.free(batch.noisy_values, index + 1)
    return rewritten


def _start(float_gm: GraphModule, rewritten: GraphModule, call: Call) -> _Batch:
    given = call[1].get(PADDING_MASK)
    mask = given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None
    return _Batch(Stepper(float_gm, call), Stepper(rewritten, call), {}, {}, mask)


def _sites_by_root(gm: GraphModule, bits: dict[str, int]) -> dict[Node, list[Any]]:
    """The layers to quantize at each node of the outermost graph, each at its first call."""
    found: dict[Node, list[Site]] = {}
    seen: set[nn.Module] = set()
    for site in sites(gm):
        if not isinstance(site.module, nn.Linear) or site.name not in bits or site.module in seen:
            continue
        seen.add(site.module)
        for node in gm.graph.nodes:
            path = f"{site.scope.path}."
            is_inside = node.op == "call_module" and path.startswith(f"{node.target}.")
            if site.node is node or (site.scope.path and is_inside):
                found.setdefault(node, []).append(site)
                break
    return found


def _swap(gm: GraphModule, first: Site, made: QuantizedLinear) -> None:
    """Put `made` wherever the graph calls the layer."""
    for site in list(sites(gm)):
        if site.module is first.module:
            site.scope.gm.set_submodule(str(site.node.target), made)


@contextmanager
def _watching(
    layers: Sequence[Any],
    partners: dict[str, nn.Module],
    moments: dict[str, InputMoments],
    mask: Tensor | None,
) -> Iterator[None]:
    """While a node runs in float and then on quantized inputs, add to its layers' moments."""
    clean: dict[str, list[Tensor]] = {site.name: [] for site in layers}

    def remember(name: str) -> Any:
        return lambda module, args: clean[name].append(args[0])

    def add(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            x_float = clean[name].pop(0) if clean[name] else x
            fits = mask is not None and x.shape[:-1] == mask.shape
            moments[name].add(x, x_float if x_float.shape == x.shape else x, mask if fits else None)

        return hook

    handles = []
    for site in layers:
        handles.append(partners[site.name].register_forward_pre_hook(remember(site.name)))
        handles.append(site.module.register_forward_pre_hook(add(site.name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
