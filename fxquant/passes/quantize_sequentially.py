"""Quantize layer by layer, each on the inputs that the quantized layers before it produce.

The float and the quantized graph run side by side over all batches, from one turn to the next (see
`turns.py`). At a turn the inputs of its layers are at hand in both graphs: their moments choose
the integers, the layers are swapped, and the run goes on through the swapped layers. Where an
output is added to a residual, the layer also makes up for the error of the residual, as far as it
can. Nothing behind the last turn runs.

Layers inside an opaque module are quantized in the order in which it calls them. A layer that runs
several times is fitted to all its calls: to the first on what the quantized graph gives it, to
those behind on what the float graph gives.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import WeightError
from fxquant.graph.calls import Call
from fxquant.graph.copying import copy_owning_tensors, copy_sharing_tensors
from fxquant.graph.layers import (
    Site,
    is_plain_linear,
    keep_bias_absent,
    layer_input,
    replace_layer,
    sites,
)
from fxquant.graph.left_alone import attributes_left_alone, graph_left_alone, left_alone
from fxquant.modules.linear import QuantizedLinear
from fxquant.observers.moments import LayerMoments
from fxquant.passes.calibrate import run_call
from fxquant.passes.collect_moments import collect, float_linear
from fxquant.passes.decide import Decision
from fxquant.passes.held_values import HeldValues
from fxquant.passes.observe_inputs import InputWatcher
from fxquant.passes.opaque_layers import OpaqueGroup, collect_inside, groups_inside
from fxquant.passes.padding import fitting_mask, padding_mask
from fxquant.passes.paired_batches import PairedBatch
from fxquant.passes.rewrite import freeze
from fxquant.passes.turns import Turn, find_turns, repeated_layers
from fxquant.report.progress import steps

QuantizeWithMoments = Callable[[str, nn.Linear, int, LayerMoments], QuantizedLinear]


@torch.no_grad()
def quantize_sequentially(
    gm: GraphModule,
    decisions: Iterable[Decision],
    calls: Sequence[Call],
    quantize_linear: QuantizeWithMoments,
    held_out: Sequence[Call] = (),
    watcher: InputWatcher | None = None,
    *,
    most_bytes: int | None = None,
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
        watcher: is given what the layers read in the float graph, of `calls`.
        most_bytes: of values that wait between layers in memory; the others wait in a file. None:
            no bound. The result is the same, bit for bit.

    Returns:
        A new graph, on memory of its own, whose nodes have the same names.

    Raises:
        CalibrationError: the graph does not take a batch, or a layer reads NaN or Inf.
        WeightError: a weight cannot be quantized; the layer is named.
    """
    bits = {d.module: d.bits for d in decisions if d.bits is not None}
    chosen = {s.module for s in sites(gm) if is_plain_linear(s.module) and s.name in bits}
    rewritten = copy_owning_tensors(gm, keep=chosen.__contains__)
    freeze(rewritten)
    float_gm = copy_sharing_tensors(gm, frozen=True)
    models = (float_gm, rewritten)
    own = [tensor for m in models for tensor in (*m.parameters(), *m.buffers())]
    held = HeldValues(most_bytes, own)
    run = _Run(float_gm, rewritten, bits, quantize_linear, watcher or InputWatcher(gm, ()), held)
    with closing(held), graph_left_alone(float_gm), attributes_left_alone(rewritten):
        run.over(calls, held_out)
    rewritten.recompile()
    return rewritten


class _Run:
    """Both graphs on their way through all batches."""

    def __init__(
        self,
        float_gm: GraphModule,
        rewritten: GraphModule,
        bits: dict[str, int],
        quantize_linear: QuantizeWithMoments,
        watcher: InputWatcher,
        held: HeldValues,
    ) -> None:
        self.float_gm, self.rewritten, self.bits = float_gm, rewritten, bits
        self.quantize_linear, self.watcher, self.held = quantize_linear, watcher, held
        self.partners = {site.name: site.module for site in sites(float_gm)}
        self.batches: list[PairedBatch] = []
        self.later: dict[str, LayerMoments] = {}

    def over(self, calls: Sequence[Call], held_out: Sequence[Call]) -> None:
        """Quantize the layers of all turns."""
        self.later = self._moments_of_later_calls(calls)
        self.batches = [
            PairedBatch.of(self.float_gm, self.rewritten, call, i, held_out=i >= len(calls))
            for i, call in enumerate((*calls, *held_out))
        ]
        for turn in steps(find_turns(self.rewritten, set(self.bits)), "fitting layers"):
            if turn.is_inside:
                self._quantize_inside(turn)
            else:
                self._quantize_together(turn)

    def _quantize_together(self, turn: Turn) -> None:
        moments = collect(turn, self._arrived(turn, turn.sites), self.later)
        self.watcher.check(site.name for site in turn.sites)
        for site in turn.sites:
            self._swap(site, moments[site.name])

    def _quantize_inside(self, turn: Turn) -> None:
        for group in self._groups_inside(turn):
            moments = {s.name: self._own_moments(s) for s in group.sites}
            arrived = self._arrived(turn, ())
            collect_inside(group, self.partners, arrived, moments, self._notice)
            self.watcher.check(moments)
            for site in group.sites:
                self._swap(site, moments[site.name])

    def _groups_inside(self, turn: Turn) -> list[OpaqueGroup]:
        """In which order the first batch sees them."""
        with closing(self._arrived(turn, ())) as arrived:
            return groups_inside(turn, next(arrived, None))

    def _arrived(self, turn: Turn, watched: Iterable[Site]) -> Generator[PairedBatch, None, None]:
        """Each batch, when both graphs have run up to the turn."""
        for batch in self.batches:
            with batch.resumed(self.held):
                batch.advance(turn.position)
                for site in () if batch.is_held_out else watched:
                    values = batch.values_of(site.input)
                    if values is not None:
                        self._notice(site.name, values[0], batch)
                yield batch

    def _notice(self, name: str, x: Tensor, batch: PairedBatch) -> None:
        """A layer reads `x` in the float graph; of layers that read the same, the first counts."""
        if name in self.watcher.leaders:
            self.watcher.add(name, x, batch.call, batch.index)

    def _own_moments(self, site: Site) -> LayerMoments:
        linear = float_linear(site)
        return self.later.pop(site.name, None) or LayerMoments(
            linear.in_features, linear.out_features
        )

    def _swap(self, site: Site, moments: LayerMoments) -> None:
        linear = float_linear(site)
        try:
            made = self.quantize_linear(site.name, linear, self.bits[site.name], moments)
        except WeightError as error:
            raise WeightError(
                f"{site.name}.weight", found=error.found, needed=error.needed, remedy=error.remedy
            ) from error
        if site.is_inside:
            keep_bias_absent(linear, made)
        replace_layer(linear, made.eval())

    def _moments_of_later_calls(self, calls: Sequence[Call]) -> dict[str, LayerMoments]:
        """Of layers that several nodes call: the moments of all inputs but the first, in float."""
        gm, moments = self.float_gm, dict[str, LayerMoments]()
        counts: dict[nn.Module, int] = defaultdict(int)
        batch = 0

        def hook_for(name: str) -> Any:
            def hook(layer: nn.Linear, args: Any, kwargs: Any, output: Tensor) -> None:
                counts[layer] += 1
                if counts[layer] > 1:
                    x = layer_input(args, kwargs)
                    mask = fitting_mask(padding_mask(calls[batch]), x)
                    moments[name].add(x, None, mask)
                    if name in self.watcher.leaders:
                        self.watcher.add(name, x, calls[batch], batch)

            return hook

        repeated = repeated_layers(gm, set(self.bits))
        with left_alone(gm):
            for layer, name in repeated.items():
                assert isinstance(layer, nn.Linear)  # plain ones are
                moments[name] = LayerMoments(layer.in_features, layer.out_features)
                layer.register_forward_hook(hook_for(name), with_kwargs=True)
            for batch, call in enumerate(calls if repeated else ()):
                counts.clear()
                run_call(gm, call, batch)
        return moments
