"""Quantize layer by layer, each on the inputs that the quantized layers before it produce.

The float and the quantized graph run side by side over all batches. Where a layer is reached, its
input in the quantized graph and its output in both are at hand: their moments choose the integers,
the layer is swapped, and the run goes on through the swapped layer. Where the output is added to a
residual, the layer also makes up for the error of the residual, as far as it can.

Layers inside an opaque module are quantized in the order in which it calls them: the module runs,
on clones of its inputs, up to the layer whose turn it is, once for each group of layers that read
the same value. A layer that runs several times is fitted to all its calls: to the first on what the
quantized graph gives it, to those behind on what the float graph gives.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.errors import WeightError
from fxquant.graph.calls import Call
from fxquant.graph.copying import copy_owning_tensors, copy_sharing_tensors
from fxquant.graph.interpreter import writable
from fxquant.graph.layers import (
    Site,
    is_plain_linear,
    keep_bias_absent,
    layer_input,
    replace_layer,
    sites,
    unbatched,
)
from fxquant.graph.left_alone import attributes_left_alone, graph_left_alone, left_alone
from fxquant.graph.residual import added_to
from fxquant.graph.stepper import Stepper
from fxquant.modules.linear import QuantizedLinear
from fxquant.observers.moments import LayerMoments
from fxquant.passes.calibrate import run_call
from fxquant.passes.decide import Decision
from fxquant.passes.padding import fitting_mask, padding_mask
from fxquant.passes.rewrite import freeze

QuantizeWithMoments = Callable[[str, nn.Linear, int, LayerMoments], QuantizedLinear]


@torch.no_grad()
def quantize_sequentially(
    gm: GraphModule,
    decisions: Iterable[Decision],
    calls: Sequence[Call],
    quantize_linear: QuantizeWithMoments,
    held_out: Sequence[Call] = (),
) -> GraphModule:
    """Swap each Linear that the table of decisions quantizes, in the order in which it runs.

    Args:
        gm: a traced model; it is not changed.
        decisions: what to quantize.
        calls: batches. A two-dimensional `attention_mask` among the keyword arguments masks padding
            out of the moments.
        quantize_linear: makes a quantized layer from `(name, linear, bits, moments)`; layers that
            no batch reaches get moments without tokens.
        held_out: batches that choose no integers; their moments are kept apart.

    Returns:
        A new graph, on memory of its own, whose nodes have the same names.
    """
    bits = {d.module: d.bits for d in decisions if d.bits is not None}
    chosen = {s.module for s in sites(gm) if is_plain_linear(s.module) and s.name in bits}
    rewritten = copy_owning_tensors(gm, keep=chosen.__contains__)
    freeze(rewritten)
    float_gm = copy_sharing_tensors(gm, frozen=True)
    run = _Run(float_gm, rewritten, bits, calls, held_out, quantize_linear)
    with graph_left_alone(float_gm), attributes_left_alone(rewritten):
        for index, node in enumerate(rewritten.graph.nodes):
            run.quantize_at(node)
            run.advance(node, index)
    rewritten.recompile()
    return rewritten


@dataclass(frozen=True)
class _Batch:
    """One batch on its way through both graphs."""

    clean: Stepper
    noisy: Stepper
    clean_values: dict[Node, Any]
    noisy_values: dict[Node, Any]
    mask: Tensor | None
    is_held_out: bool

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

    def add_clean(self, x: Tensor, output: Tensor) -> None:
        """A call in the float graph."""
        self.clean_outputs.append(output)

    def add_noisy(self, x: Tensor, output: Tensor) -> None:
        """A call in the quantized graph, with the layer itself still in float."""
        self.inputs.append(x)
        self.outputs.append(output)


class _Run:
    """Both graphs on their way through all batches."""

    def __init__(
        self,
        float_gm: GraphModule,
        rewritten: GraphModule,
        bits: dict[str, int],
        calls: Sequence[Call],
        held_out: Sequence[Call],
        quantize_linear: QuantizeWithMoments,
    ) -> None:
        self.float_gm, self.rewritten, self.bits = float_gm, rewritten, bits
        self.quantize_linear = quantize_linear
        self.partners = {site.name: site.module for site in sites(float_gm)}
        self.pending = self._first_sites()
        self.later = _moments_of_later_calls(float_gm, bits, calls)
        self.batches = [
            _Batch(Stepper(float_gm, c), Stepper(rewritten, c), {}, {}, padding_mask(c), is_held)
            for is_held, batches in ((False, calls), (True, held_out))
            for c in batches
        ]
        self.clean_node = dict(zip(rewritten.graph.nodes, float_gm.graph.nodes, strict=True))

    def quantize_at(self, node: Node) -> None:
        """Quantize the layers that first run at `node`."""
        layers = self.pending.get(node, [])
        if layers and not layers[0].is_inside:
            self._quantize_node(node, layers[0])
        elif layers:
            for group, counts in self._groups(node, layers):
                self._quantize_inside(node, group, counts)

    def advance(self, node: Node, index: int) -> None:
        """Let all batches pass `node` in both graphs, and forget what nobody needs."""
        clean = self.clean_node[node]
        for batch in self.batches:
            if clean not in batch.clean_values:
                batch.clean_values[clean] = batch.clean.compute(clean, batch.clean_values)
            batch.noisy_values[node] = batch.noisy.compute(node, batch.noisy_values)
            batch.clean.free(batch.clean_values, index + 1)
            batch.noisy.free(batch.noisy_values, index + 1)

    def _first_sites(self) -> dict[Node, list[Site]]:
        """The layers to quantize at each node, each at its first call."""
        found: dict[Node, list[Site]] = defaultdict(list)
        seen: set[nn.Module] = set()
        for site in sites(self.rewritten):
            if is_plain_linear(site.module) and site.name in self.bits and site.module not in seen:
                seen.add(site.module)
                found[site.node].append(site)
        return found

    def _quantize_node(self, node: Node, site: Site) -> None:
        moments, clean = self._moments(site), self.clean_node[node]
        residual = added_to(self.rewritten, node)
        linear = site.module
        assert isinstance(linear, nn.Linear)  # pending ones are
        for batch in self.batches:
            batch.clean_values[clean] = batch.clean.compute(clean, batch.clean_values)
            x = batch.noisy_values.get(site.input) if site.input is not None else None
            if not isinstance(x, Tensor):
                continue
            seen = _Seen([batch.clean_values[clean]], [x], [linear(x)])
            _add(moments, seen, batch, residual)
        self._swap(site, moments)

    def _groups(self, node: Node, layers: list[Site]) -> list[tuple[list[Site], dict[str, int]]]:
        """Layers of an opaque module in the order of its calls, those with one input together."""
        order: list[tuple[str, tuple[Any, ...]]] = []
        by_name = {site.name: site for site in layers}

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
                x = layer_input(args, kwargs)
                order.append((name, (x.data_ptr(), tuple(x.shape), x._version)))

            return hook

        for batch in self.batches[:1]:
            hooks = {site.module: note(site.name) for site in layers}
            _run_node(batch.noisy, node, batch.noisy_values, hooks)
        groups: list[tuple[list[Site], tuple[Any, ...] | None]] = []
        counts: dict[str, int] = defaultdict(int)
        for name, read in order:
            counts[name] += 1
            if counts[name] > 1:
                continue
            if groups and groups[-1][1] == read:
                groups[-1][0].append(by_name[name])
            else:
                groups.append(([by_name[name]], read))
        rest = [site for site in layers if site.name not in counts]
        return [(g, counts) for g, _ in groups] + ([(rest, counts)] if rest else [])

    def _quantize_inside(self, node: Node, layers: list[Site], counts: dict[str, int]) -> None:
        moments = {site.name: self._moments(site) for site in layers}
        expected = sum(counts.get(site.name, 0) for site in layers)
        for batch in self.batches if expected else []:
            seen = {site.name: _Seen() for site in layers}
            clean, noisy = _Countdown(expected), _Countdown(expected)
            hooks = {self.partners[name]: clean.then(s.add_clean) for name, s in seen.items()}
            _run_node(batch.clean, self.clean_node[node], batch.clean_values, hooks)
            hooks = {site.module: noisy.then(seen[site.name].add_noisy) for site in layers}
            _run_node(batch.noisy, node, batch.noisy_values, hooks)
            for name, what in seen.items():
                _add(moments[name], what, batch, None)
        for site in layers:
            self._swap(site, moments[site.name])

    def _moments(self, site: Site) -> LayerMoments:
        linear = site.module
        assert isinstance(linear, nn.Linear)  # pending ones are
        return self.later.pop(site.name, None) or LayerMoments(
            linear.in_features, linear.out_features
        )

    def _swap(self, site: Site, moments: LayerMoments) -> None:
        linear = site.module
        assert isinstance(linear, nn.Linear)  # pending ones are
        try:
            made = self.quantize_linear(site.name, linear, self.bits[site.name], moments)
        except WeightError as error:
            raise WeightError(
                f"{site.name}.weight", found=error.found, needed=error.needed, remedy=error.remedy
            ) from error
        if site.is_inside:
            keep_bias_absent(linear, made)
        replace_layer(linear, made.eval())


class _StopError(BaseException):
    """Ends a run inside an opaque module; no `except Exception` of its code catches it."""


class _Countdown:
    """Hooks that note calls of layers and end the run after the last one."""

    def __init__(self, expected: int) -> None:
        self.left = expected

    def then(self, note: Callable[[Tensor, Tensor], object]) -> Any:
        """A hook that notes clones: the module's code may write into what it gets."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            note(layer_input(args, kwargs).clone(), unbatched(output).clone())
            self.left -= 1
            if not self.left:
                raise _StopError

        return hook


def _run_node(
    stepper: Stepper, node: Node, values: dict[Node, Any], hooks: dict[nn.Module, Any]
) -> None:
    """Run an opaque module on clones of its inputs; it is left as it was."""
    module = stepper.gm.get_submodule(str(node.target))
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
    with left_alone(module):
        for layer, hook in hooks.items():
            layer.register_forward_hook(hook, with_kwargs=True)
        torch.manual_seed(stepper.drawing.get(node, 0))
        with suppress(_StopError):
            Call(writable(tuple(args)), writable(dict(kwargs))).run(module)


def _moments_of_later_calls(
    gm: GraphModule, bits: dict[str, int], calls: Sequence[Call]
) -> dict[str, LayerMoments]:
    """Of layers that several nodes call: the moments of all inputs but the first, in float."""
    nodes: dict[nn.Module, list[Site]] = defaultdict(list)
    for site in sites(gm):
        if is_plain_linear(site.module) and site.name in bits:
            nodes[site.module].append(site)
    repeated = {layer: found for layer, found in nodes.items() if len(found) > 1}
    moments: dict[str, LayerMoments] = {}
    if not repeated:
        return moments
    mask: Tensor | None = None
    counts: dict[nn.Module, int] = defaultdict(int)

    def hook_for(name: str) -> Any:
        def hook(layer: nn.Linear, args: Any, kwargs: Any, output: Tensor) -> None:
            counts[layer] += 1
            if counts[layer] > 1:
                x = layer_input(args, kwargs)
                moments[name].add(x, torch.zeros_like(output), fitting_mask(mask, x))

        return hook

    with left_alone(gm):
        for layer, found in repeated.items():
            assert isinstance(layer, nn.Linear)  # plain ones are
            moments[found[0].name] = LayerMoments(layer.in_features, layer.out_features)
            layer.register_forward_hook(hook_for(found[0].name), with_kwargs=True)
        for index, call in enumerate(calls):
            counts.clear()
            mask = padding_mask(call)
            run_call(gm, call, index)
    return moments


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
        add = moments.hold_out if batch.is_held_out else moments.add
        add(x, shift, fitting_mask(batch.mask, x))


def _is_reshaped(one: Tensor, other: Tensor) -> bool:
    return one.shape[-1:] == other.shape[-1:] and one.numel() == other.numel()
