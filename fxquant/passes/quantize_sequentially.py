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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph.calls import Call
from fxquant.graph.copying import copy_owning_tensors, copy_sharing_tensors
from fxquant.graph.layers import (
    Site,
    keep_bias_absent,
    layer_arguments,
    replace_layer,
    sites,
)
from fxquant.graph.left_alone import attributes_left_alone, graph_left_alone, left_alone
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.weight_forms import chosen_form, form_of
from fxquant.observers.moments import LayerMoments
from fxquant.passes.block_moments import add_call, collect_blocks, empty_moments
from fxquant.passes.calibrate import run_call
from fxquant.passes.collect_moments import collect
from fxquant.passes.decide import Decision
from fxquant.passes.held_values import HeldValues
from fxquant.passes.layer_maker import Blocks, naming
from fxquant.passes.observe_inputs import InputWatcher
from fxquant.passes.opaque_layers import OpaqueGroup, collect_inside, groups_inside
from fxquant.passes.padding import padding_mask
from fxquant.passes.paired_batches import PairedBatch
from fxquant.passes.rewrite import freeze, share_tables
from fxquant.passes.turns import Turn, find_turns, repeated_layers
from fxquant.report.progress import steps

QuantizeWithMoments = Callable[[str, nn.Module, int, Iterable[LayerMoments]], QuantizedLayer]


@torch.no_grad()
def quantize_sequentially(
    gm: GraphModule,
    decisions: Iterable[Decision],
    calls: Sequence[Call],
    quantize_layer: QuantizeWithMoments,
    held_out: Sequence[Call] = (),
    watcher: InputWatcher | None = None,
    *,
    noisy: Sequence[Call] | None = None,
    most_bytes: int | None = None,
) -> GraphModule:
    """Swap each layer that the table of decisions quantizes, in the order in which it runs.

    Args:
        gm: a traced model; it is not changed.
        decisions: what to quantize.
        calls: batches. A two-dimensional `attention_mask` among the keyword arguments masks padding
            out of the moments.
        quantize_layer: makes a quantized layer from `(name, layer, bits, moments)`, with the
            moments of each block of rows, none of lookups; those of blocks that no batch reaches
            have no tokens.
        held_out: batches that choose no integers; their moments are kept apart.
        watcher: is given what the layers read in the float graph, of `calls`.
        noisy: what the quantized graph is called with in the place of `calls` and then `held_out`,
            where layers in front of the graph are quantized too. None: the same as the float graph.
        most_bytes: of values that wait between layers in memory; the others wait in a file. None:
            no bound. The result is the same, bit for bit.

    Returns:
        A new graph, on memory of its own, whose nodes have the same names.

    Raises:
        CalibrationError: the graph does not take a batch, or a layer reads NaN or Inf.
        WeightError: a weight cannot be quantized; the layer is named.
    """
    bits = {d.module: d.bits for d in decisions if d.bits is not None}
    chosen = {s.module for s in sites(gm) if form_of(s.module) and s.name in bits}
    rewritten = copy_owning_tensors(gm, keep=chosen.__contains__)
    freeze(rewritten)
    float_gm = copy_sharing_tensors(gm, frozen=True)
    models = (float_gm, rewritten)
    own = [tensor for m in models for tensor in (*m.parameters(), *m.buffers())]
    held = HeldValues(most_bytes, own)
    run = _Run(float_gm, rewritten, bits, quantize_layer, watcher or InputWatcher(gm, ()), held)
    with closing(held), graph_left_alone(float_gm), attributes_left_alone(rewritten):
        run.over(calls, held_out, noisy)
    share_tables(rewritten)
    rewritten.recompile()
    return rewritten


class _Run:
    """Both graphs on their way through all batches."""

    def __init__(
        self,
        float_gm: GraphModule,
        rewritten: GraphModule,
        bits: dict[str, int],
        quantize_layer: QuantizeWithMoments,
        watcher: InputWatcher,
        held: HeldValues,
    ) -> None:
        self.float_gm, self.rewritten, self.bits = float_gm, rewritten, bits
        self.quantize_layer, self.watcher, self.held = quantize_layer, watcher, held
        self.partners = {site.name: site.module for site in sites(float_gm)}
        self.batches: list[PairedBatch] = []
        self.later: dict[str, list[LayerMoments]] = {}

    def over(
        self, calls: Sequence[Call], held_out: Sequence[Call], noisy: Sequence[Call] | None
    ) -> None:
        """Quantize the layers of all turns."""
        self.later = self._moments_of_later_calls(calls)
        models, count = (self.float_gm, self.rewritten), len(calls)
        clean = [partial(calls.__getitem__, i) for i in range(count)]
        clean += [partial(held_out.__getitem__, i) for i in range(len(held_out))]
        given = clean
        if noisy is not None:
            given = [partial(noisy.__getitem__, i) for i in range(len(noisy))]
        self.batches = [
            PairedBatch.of(models, pair, i, held_out=i >= count)
            for i, pair in enumerate(zip(clean, given, strict=True))
        ]
        for turn in steps(find_turns(self.rewritten, set(self.bits)), "fitting layers"):
            if turn.is_inside:
                self._quantize_inside(turn)
            else:
                self._quantize_together(turn)

    def _quantize_together(self, turn: Turn) -> None:
        if not chosen_form(turn.sites[0].module).shares_input:
            self._swap(turn.sites[0], self._moments_of_blocks(turn))
            return
        known = {name: found[0] for name, found in self.later.items()}
        moments = collect(turn, self._arrived(turn, turn.sites), known)
        self.watcher.check(site.name for site in turn.sites)
        for site in turn.sites:
            self._swap(site, [moments[site.name]])

    def _moments_of_blocks(self, turn: Turn) -> Iterator[LayerMoments]:
        """The moments of each block of the turn's one layer."""
        watched = list(turn.sites)

        def arrived() -> Iterator[PairedBatch]:
            yield from self._arrived(turn, watched)
            watched.clear()  # what it reads is noticed once

        return collect_blocks(turn, arrived, self.later.pop(turn.sites[0].name, None))

    def _quantize_inside(self, turn: Turn) -> None:
        for group in self._groups_inside(turn):
            moments = {s.name: self._own_moments(s) for s in group.sites}
            arrived = self._arrived(turn, ())
            collect_inside(group, self.partners, arrived, moments, self._notice)
            self.watcher.check(moments)
            for site in group.sites:
                self._swap(site, [moments[site.name]])

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
                    arguments = batch.arguments(site.node)
                    if arguments is not None:
                        self._notice(site.name, arguments[0], batch)
                yield batch

    def _notice(self, name: str, arguments: tuple[Any, ...], batch: PairedBatch) -> None:
        """A layer is called in the float graph; of layers that read the same, the first counts."""
        if name in self.watcher.leaders:
            self.watcher.add(name, arguments, batch.padding, batch.index)

    def _own_moments(self, site: Site) -> LayerMoments:
        later = self.later.pop(site.name, None) or empty_moments(Blocks(site.module), range(1))
        return later[0]

    def _swap(self, site: Site, moments: Iterable[LayerMoments]) -> None:
        with naming(site.name):
            made = self.quantize_layer(site.name, site.module, self.bits[site.name], moments)
        if site.is_inside:
            keep_bias_absent(site.module, made)
        replace_layer(site.module, made.eval())

    def _moments_of_later_calls(self, calls: Sequence[Call]) -> dict[str, list[LayerMoments]]:
        """Of layers that several nodes call: the moments of all inputs but the first, in float."""
        gm, moments = self.float_gm, dict[str, list[LayerMoments]]()
        counts: dict[nn.Module, int] = defaultdict(int)
        batch, mask = 0, None

        def hook_for(name: str, blocks: Blocks) -> Any:
            def hook(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
                counts[layer] += 1
                if counts[layer] > 1:
                    arguments = layer_arguments(args, kwargs)
                    add_call(moments[name], blocks, range(blocks.count), arguments, None, mask)
                    if name in self.watcher.leaders:
                        self.watcher.add(name, arguments, mask, batch)

            return hook

        repeated = repeated_layers(gm, set(self.bits))
        with left_alone(gm):
            for layer, name in repeated.items():
                blocks = Blocks(layer)
                moments[name] = empty_moments(blocks, range(blocks.count))
                layer.register_forward_hook(hook_for(name, blocks), with_kwargs=True)
            for batch, call in enumerate(calls if repeated else ()):
                counts.clear()
                mask = padding_mask(call)
                run_call(gm, call, batch)
        return moments
