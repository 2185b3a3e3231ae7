"""Quantize layer by layer, each on the inputs that the quantized layers before it produce.

The float and the quantized graph run side by side over all batches. Where a layer is reached, its
input in the quantized graph and its output in both are at hand: their moments choose the integers,
the layer is swapped, and the run goes on through the swapped layer. Where the output is added to a
residual, the layer also makes up for the error of the residual, as far as it can. Layers inside an
opaque module are quantized together, before the run goes on through that module.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.algorithms.moments import LayerMoments
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.residual import added_to
from fxquant.graph.scopes import Site, sites
from fxquant.graph.stepper import Call, Stepper
from fxquant.modules.linear import QuantizedLinear
from fxquant.passes.decide import Decision
from fxquant.passes.padding import fitting_mask, padding_mask

QuantizeWithMoments = Callable[[str, nn.Linear, int, LayerMoments], QuantizedLinear]


@dataclass(frozen=True)
class _Batch:
    """One batch on its way through both graphs."""

    clean: Stepper
    noisy: Stepper
    clean_values: dict[Node, Any]
    noisy_values: dict[Node, Any]
    mask: Tensor | None

    def difference(self, node: Node | None) -> Tensor | None:
        """The float value of a node of the quantized graph less its value there, if known."""
        if node not in self.noisy_values:
            return None
        clean = self.clean_values[self.clean.nodes[self.noisy.nodes.index(node)]]
        noisy = self.noisy_values[node]
        if not isinstance(clean, Tensor) or not isinstance(noisy, Tensor):
            return None
        return clean.float() - noisy.float() if clean.shape == noisy.shape else None


@dataclass
class _Seen:
    """What hooks noted of one layer during one batch, call by call."""

    clean_outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


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
        moments = {
            s.name: LayerMoments(s.module.in_features, s.module.out_features) for s in layers
        }
        residuals = {s.name: added_to(rewritten, node) for s in layers if s.node is node}
        for batch in batches:
            clean_node = batch.clean.nodes[index]
            with _watching(layers, partners) as seen:
                batch.clean_values[clean_node] = batch.clean.compute(clean_node, batch.clean_values)
                if layers:  # in float still, to see what arrives
                    batch.noisy.compute(node, batch.noisy_values)
            for name, calls_seen in seen.items():
                _add(moments[name], calls_seen, batch, residuals.get(name))
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
    return _Batch(Stepper(float_gm, call), Stepper(rewritten, call), {}, {}, padding_mask(call))


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
def _watching(layers: Sequence[Any], partners: dict[str, nn.Module]) -> Iterator[dict[str, _Seen]]:
    """While a node runs in float and then on quantized inputs, note what its layers do."""
    seen = {site.name: _Seen() for site in layers}

    def clean_hook(name: str) -> Any:
        return lambda module, args, output: seen[name].clean_outputs.append(output)

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name].inputs.append(args[0])
            seen[name].outputs.append(output)

        return note

    handles = []
    for site in layers:
        handles.append(partners[site.name].register_forward_hook(clean_hook(site.name)))
        handles.append(site.module.register_forward_hook(hook(site.name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _add(moments: LayerMoments, seen: _Seen, batch: _Batch, residual: Node | None) -> None:
    """Add what was seen of a layer to its moments."""
    # A layer in an opaque module may be called a different number of times: then nothing matches.
    are_matched = len(seen.clean_outputs) == len(seen.outputs)
    for i, (x, output) in enumerate(zip(seen.inputs, seen.outputs, strict=True)):
        shift = None
        if are_matched and seen.clean_outputs[i].shape == output.shape:
            shift = seen.clean_outputs[i].float() - output.float()
            difference = batch.difference(residual) if residual is not None else None
            if difference is not None and _is_reshaped(difference, output):
                shift = shift + difference.reshape(output.shape)
        moments.add(x, shift, fitting_mask(batch.mask, x))


def _is_reshaped(one: Tensor, other: Tensor) -> bool:
    return one.shape[-1:] == other.shape[-1:] and one.numel() == other.numel()
