"""Quantize layer by layer, each on the inputs that the quantized layers before it produce.

The float and the quantized graph run side by side over all batches, from one turn to the next (see
`turns.py`). At a turn the inputs of its layers are at hand in both graphs: their moments choose
the integers, the layers are swapped, and the run goes on through the swapped layers. Where an
output is added to a residual, the layer also makes up for the error of the residual, as far as it
can. Nothing behind the last turn runs.

Layers inside an opaque module are quantized in the order in which it calls them. A layer that runs
several times is fitted to all its calls: to the first on what the quantized graph gives it, to
those behind on what the float graph gives.

Where several processes share the work, each runs the batches of its parts, and owns some layers of
a turn (see `fxquant/distributed`).
"""

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.distributed.parts import parts_of
from fxquant.distributed.processes import ALONE, Processes
from fxquant.graph.calls import Call
from fxquant.graph.copying import copy_sharing_tensors, own_memory
from fxquant.graph.layers import (
    Site,
    keep_bias_absent,
    replace_layer,
    sites,
)
from fxquant.graph.left_alone import (
    attributes_left_alone,
    graph_left_alone,
    written_tensors,
)
from fxquant.graph.stepper import narrowest_place
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.weight_forms import chosen_form, form_of
from fxquant.observers.moments import LayerMoments, merge_all
from fxquant.passes.block_moments import (
    chunks_of_blocks,
    collect_blocks,
    empty_moments,
    slice_of,
)
from fxquant.passes.collect_moments import collect, empty_moments_of
from fxquant.passes.decide import Decision
from fxquant.passes.float_products import multiply_as_made, multiply_in_float
from fxquant.passes.freed_memory import FreedMemory
from fxquant.passes.held_values import HeldValues
from fxquant.passes.later_calls import moments_of_later_calls
from fxquant.passes.layer_maker import Blocks, naming
from fxquant.passes.observe_inputs import InputWatcher, Seen
from fxquant.passes.opaque_layers import OpaqueGroup, collect_inside, groups_inside
from fxquant.passes.paired_batches import PairedBatch
from fxquant.passes.rewrite import freeze, share_tables
from fxquant.passes.turns import Turn, find_turns
from fxquant.report.progress import steps


class LayerFitter(Protocol):
    """Makes quantized layers of moments, in two steps: the costly one can be done elsewhere."""

    def fit(self, name: str, blocks: Blocks, index: int, bits: int, moments: LayerMoments) -> Any:
        """A block of rows in `bits` bits; the fitter itself stays as it is.

        Args:
            name: of the layer.
            blocks: of the layer.
            index: of the block.
            bits: of an integer.
            moments: of what the block multiplies; without tokens where no batch reaches it.
        """

    def make(self, name: str, layer: nn.Module, bits: int, fitted: Sequence[Any]) -> QuantizedLayer:
        """The layer of the results of `fit` for all its blocks, in order; none of a lookup."""


@dataclass
class _PartSums:
    """What is collected over a part of the batches.

    Attributes:
        moments: of layers or blocks, in an order that is known.
        seen: what layers read in the float graph.
    """

    moments: list[LayerMoments]
    seen: Seen


Collect = Callable[[Seen, Iterable[PairedBatch]], list[LayerMoments]]


@torch.no_grad()
def quantize_sequentially(
    gm: GraphModule,
    decisions: Iterable[Decision],
    calls: Sequence[Call],
    fitter: LayerFitter,
    held_out: Sequence[Call] = (),
    watcher: InputWatcher | None = None,
    *,
    noisy: Sequence[Call] | None = None,
    most_bytes: int | None = None,
    processes: Processes = ALONE,
) -> GraphModule:
    """Swap each layer that the table of decisions quantizes, in the order in which it runs.

    Args:
        gm: a traced model; it is not changed.
        decisions: what to quantize.
        calls: batches. A two-dimensional `attention_mask` among the keyword arguments masks padding
            out of the moments.
        fitter: makes the quantized layers.
        held_out: batches that choose no integers; their moments are kept apart.
        watcher: is given what the layers read in the float graph, of `calls`.
        noisy: what the quantized graph is called with in the place of `calls` and then `held_out`,
            where layers in front of the graph are quantized too. None: the same as the float graph.
        most_bytes: of values that wait between layers in memory; the others wait in a file. None:
            no bound. The result is the same, bit for bit.
        processes: that share batches and layers; the result is the same, bit for bit.

    Returns:
        A new graph, on memory of its own, whose nodes have the same names.

    Raises:
        CalibrationError: the graph does not take a batch, or a layer reads NaN or Inf.
        WeightError: a weight cannot be quantized; the layer is named.
    """
    bits = {d.module: d.bits for d in decisions if d.bits is not None}
    chosen = {s.module for s in sites(gm) if form_of(s.module) and s.name in bits}
    rewritten = _copy_to_change(gm, chosen)
    freeze(rewritten)
    float_gm = copy_sharing_tensors(gm, frozen=True)
    models = (float_gm, rewritten)
    own = [tensor for m in models for tensor in (*m.parameters(), *m.buffers())]
    held = HeldValues(most_bytes, own)
    run = _Run(float_gm, rewritten, bits, fitter, watcher or InputWatcher(gm, ()), held, processes)
    with closing(held), graph_left_alone(float_gm), attributes_left_alone(rewritten):
        run.over(calls, held_out, noisy)
    multiply_as_made(rewritten)
    run.freed.give_back()
    own_memory(rewritten, apart_from=gm)
    share_tables(rewritten)
    rewritten.recompile()
    return rewritten


def _copy_to_change(gm: GraphModule, chosen: Collection[nn.Module]) -> GraphModule:
    """A copy of the graph on which layers are swapped while data runs.

    What no run writes into lies in the memory of `gm` until all layers are made: meanwhile most of
    what a run holds is needed, and an embedding can be larger than all of that.
    """
    kept = {id(p) for module in chosen for p in module.parameters(recurse=False)}
    written = set(map(id, written_tensors(gm)))

    def is_own(tensor: Tensor) -> bool:
        can_wait = type(tensor) is nn.Parameter and tensor.layout is torch.strided
        return id(tensor) not in kept and (id(tensor) in written or not can_wait)

    return copy_sharing_tensors(gm, is_own=is_own)


class _Run:
    """Both graphs on their way through the batches that are this process's."""

    def __init__(
        self,
        float_gm: GraphModule,
        rewritten: GraphModule,
        bits: dict[str, int],
        fitter: LayerFitter,
        watcher: InputWatcher,
        held: HeldValues,
        processes: Processes,
    ) -> None:
        self.float_gm, self.rewritten, self.bits = float_gm, rewritten, bits
        self.fitter, self.watcher, self.held, self.processes = fitter, watcher, held, processes
        self.partners = {site.name: site.module for site in sites(float_gm)}
        self.batches: list[PairedBatch] = []
        self.parts: list[range] = []
        self.later: dict[str, list[LayerMoments]] = {}
        self.turns: list[Turn] = []
        self.freed = FreedMemory(held.most_bytes)

    def over(
        self, calls: Sequence[Call], held_out: Sequence[Call], noisy: Sequence[Call] | None
    ) -> None:
        """Quantize the layers of all turns."""
        self.later = moments_of_later_calls(self.float_gm, set(self.bits), calls, self.watcher)
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
        # How many tokens are held out is bounded over all batches, so these are one part.
        self.parts = [*parts_of(count), *([range(count, len(clean))] if held_out else [])]
        self.turns = find_turns(self.rewritten, set(self.bits))
        for turn in steps(self.turns, "fitting layers"):
            if turn.is_inside:
                self._quantize_inside(turn)
            elif chosen_form(turn.sites[0].module).shares_input:
                self._quantize_together(turn)
            else:
                self._quantize_blocks(turn)

    def _quantize_together(self, turn: Turn) -> None:
        """Linear layers that read one value of the graph."""

        def collect_part(seen: Seen, batches: Iterable[PairedBatch]) -> list[LayerMoments]:
            return collect(turn, self._noticing(seen, turn.sites, batches))

        moments = list(empty_moments_of(turn).values())
        self._add_later(turn.sites[0], moments)
        self._collect(turn, moments, collect_part, is_whole=True)
        self.watcher.check(site.name for site in turn.sites)
        self._swap_fitted(turn.sites, moments)

    def _quantize_blocks(self, turn: Turn) -> None:
        """A layer of another kind, some blocks of rows at a time."""
        site, blocks = turn.sites[0], Blocks(turn.sites[0].module)
        later, fitted = self.later.pop(site.name, None), list[Any]()
        for chosen in chunks_of_blocks(blocks):
            watched = [] if fitted else [site]  # what it reads is noticed once

            def collect_part(
                seen: Seen,
                batches: Iterable[PairedBatch],
                chosen: range = chosen,
                watched: Sequence[Site] = watched,
            ) -> list[LayerMoments]:
                return collect_blocks(turn, blocks, chosen, self._noticing(seen, watched, batches))

            moments = empty_moments(blocks, chosen) if later is None else later[slice_of(chosen)]
            self._collect(turn, moments, collect_part)
            work = zip(chosen, moments, strict=True)
            fitted += self._fit([(site, blocks, i, own) for i, own in work])
        self._swap(site, fitted)

    def _quantize_inside(self, turn: Turn) -> None:
        """The layers of an opaque module, those of one input together."""
        multiplying = []
        for site in turn.sites:
            if chosen_form(site.module).is_lookup:
                self._swap(site, [])
            else:
                multiplying.append(site)
        for group in self._groups_inside(replace(turn, sites=multiplying)) if multiplying else ():

            def collect_part(
                seen: Seen, batches: Iterable[PairedBatch], group: OpaqueGroup = group
            ) -> list[LayerMoments]:
                return collect_inside(group, self.partners, partial(self._notice, seen), batches)

            moments = list[LayerMoments]()
            for site in group.sites:
                blocks = group.blocks[site.name]
                own = empty_moments(blocks, range(blocks.count))
                self._add_later(site, own)
                moments += own
            self._collect(turn, moments, collect_part)
            self.watcher.check(site.name for site in group.sites)
            self._swap_fitted(group.sites, moments)

    def _groups_inside(self, turn: Turn) -> list[OpaqueGroup]:
        """In which order the first batch sees them; it is one process's."""
        with closing(self._arrived(turn, self.parts[0])) as arrived:
            first = next(arrived, None) if self.processes.rank == 0 else None
            found = groups_inside(turn, first)
        by_name = {site.name: site for site in turn.sites}
        names = [([site.name for site in group.sites], group.counts) for group in found]
        return [
            OpaqueGroup([by_name[name] for name in group], counts)
            for group, counts in self.processes.broadcast(names, 0)
        ]

    def _collect(
        self,
        turn: Turn,
        moments: list[LayerMoments],
        collect_part: Collect,
        *,
        is_whole: bool = False,
    ) -> None:
        """Add what the parts of the data say, in their order, to moments and watched inputs.

        Args:
            turn: where the data are.
            moments: of layers or blocks there.
            collect_part: gives the same of a part of the data.
            is_whole: whether nothing else is collected at this turn.
        """

        def sums(part: range) -> _PartSums:
            seen: Seen = {}
            return _PartSums(collect_part(seen, self._arrived(turn, part, is_whole=is_whole)), seen)

        for found in self.processes.in_order([partial(sums, part) for part in self.parts]):
            merge_all(moments, found.moments)
            self.watcher.merge(found.seen)

    def _arrived(
        self, turn: Turn, part: range, *, is_whole: bool = False
    ) -> Generator[PairedBatch, None, None]:
        """Each batch of a part, when both graphs have run up to the turn.

        Args:
            turn: where they go.
            part: which batches.
            is_whole: whether nobody asks for this again; then few values are left behind.
        """
        is_last = turn is self.turns[-1]
        ahead = self._narrowest_after(turn) if is_whole and not is_last else 0
        for index in part:
            batch = self.batches[index]
            with batch.resumed(self.held):
                batch.advance(turn.position)
                yield batch
                batch.run_ahead(ahead)
                if is_whole and is_last:
                    batch.forget()
            self.freed.give_back()

    def _narrowest_after(self, turn: Turn) -> int:
        """To where the float graph goes when a turn is over: it waits for no layer."""
        following = self.turns[self.turns.index(turn) + 1]
        return narrowest_place(self.float_gm, turn.position, following.position)

    def _noticing(
        self, seen: Seen, watched: Sequence[Site], batches: Iterable[PairedBatch]
    ) -> Iterator[PairedBatch]:
        """The batches, while what layers read in the float graph is noticed."""
        for batch in batches:
            for site in () if batch.is_held_out else watched:
                arguments = batch.arguments(site.node)
                if arguments is not None:
                    self._notice(seen, site.name, arguments[0], batch)
            yield batch

    def _notice(
        self, seen: Seen, name: str, arguments: tuple[Any, ...], batch: PairedBatch
    ) -> None:
        """A layer is called in the float graph; of layers that read the same, the first counts."""
        self.watcher.add(seen, name, arguments, batch.padding, batch.index)

    def _add_later(self, site: Site, moments: list[LayerMoments]) -> None:
        """Begin with what is known of further calls of a layer."""
        if site.name in self.later:
            merge_all(moments, self.later.pop(site.name))

    def _swap_fitted(self, chosen: Sequence[Site], moments: Sequence[LayerMoments]) -> None:
        """Swap layers, given the moments of all their blocks."""
        blocks = [(site, Blocks(site.module)) for site in chosen]
        places = [(site, own, i) for site, own in blocks for i in range(own.count)]
        work = zip(places, moments, strict=True)
        fitted = iter(self._fit([(*place, own) for place, own in work]))
        for site, own in blocks:
            self._swap(site, list(islice(fitted, own.count)))

    def _fit(self, work: Sequence[tuple[Site, Blocks, int, LayerMoments]]) -> list[Any]:
        """What the fitter makes of each block of rows."""

        def fit(site: Site, blocks: Blocks, index: int, moments: LayerMoments) -> Any:
            with naming(site.name):
                return self.fitter.fit(site.name, blocks, index, self.bits[site.name], moments)

        costs = [blocks.inputs**2 * (blocks.inputs + blocks.rows) for _, blocks, _, _ in work]
        fitted = self.processes.share(costs, [partial(fit, *own) for own in work])
        self.freed.give_back()
        return fitted

    def _swap(self, site: Site, fitted: Sequence[Any]) -> None:
        with naming(site.name):
            made = self.fitter.make(site.name, site.module, self.bits[site.name], fitted)
        if site.is_inside:
            keep_bias_absent(site.module, made)
        replace_layer(site.module, made.eval())
        multiply_in_float(site.module)
