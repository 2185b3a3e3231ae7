"""What the inputs of linear layers look like: from data, or from what a graph promises.

`InputWatcher` is the one collector. It is given inputs by `observe_inputs`, which runs the data
through a graph, or by a pass that has them at hand anyway, such as `quantize_sequentially`.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.distributed.parts import parts_of
from fxquant.distributed.processes import ALONE, Processes
from fxquant.graph.calls import Call
from fxquant.graph.channel_scaling import NORMS
from fxquant.graph.effects import writes_before
from fxquant.graph.layers import Site, is_plain_linear, layer_arguments, sites
from fxquant.modules.weight_forms import block_names, form_of
from fxquant.observers import Observer, create_observer
from fxquant.observers.input_statistics import InputStatistics
from fxquant.passes.calibrate import run_call
from fxquant.passes.layer_maker import Blocks
from fxquant.passes.padding import fitting_mask, padding_mask
from fxquant.passes.turns import repeated_layers


@dataclass
class SeenInput:
    """What is known of a value that layers read.

    Attributes:
        ranges: of all its elements; None where they are not asked for.
        statistics: channel by channel, of what blocks of rows multiply: of all in one where all
            blocks see equally many tokens, or else one of each.
    """

    ranges: Observer | None
    statistics: list[InputStatistics]

    def merge(self, other: "SeenInput") -> None:
        """Add what `other` saw, as if it came after what was seen here."""
        if self.ranges is not None and other.ranges is not None:
            self.ranges.merge(other.ranges)
        for own, more in zip(self.statistics, other.statistics, strict=True):
            own.merge(more)


Seen = dict[str, SeenInput]  # by the first layer that reads a value


class InputWatcher:
    """Collects ranges and statistics of what layers read.

    Args:
        gm: a traced model.
        names: of the layers to watch.
        observer: of the ranges, a name that `create_observer` knows; None: none.
        has_statistics: whether to collect statistics channel by channel.

    Attributes:
        observers: by the name of a layer that multiplies its input. Linear layers that read one
            value share the object.
        statistics: by the name of a layer as `SeenInput` has them, shared in the same way. Those of
            several blocks keep no sample of tokens. Layers that look rows up have none.
        leaders: of each value that is read, the first layer that reads it, by name.
        seen: what is known of each of these values.
    """

    def __init__(
        self,
        gm: GraphModule,
        names: Iterable[str],
        *,
        observer: str | None = None,
        has_statistics: bool = True,
    ) -> None:
        leaders: dict[str, Site] = {}  # of each layer: the first that reads the same value
        by_place: dict[tuple[object, ...], Site] = {}
        wanted, written = set(names), writes_before(gm)
        repeated = repeated_layers(gm, wanted)
        for site in sites(gm):
            form = form_of(site.module)
            if form is None or form.is_lookup or site.name not in wanted or site.name in leaders:
                continue
            place: tuple[object, ...] = (site.target,)
            if form.shares_input and site.input is not None and site.module not in repeated:
                place = (site.input, written[site.node])
            leaders[site.name] = by_place.setdefault(place, site)
        first = {site.name: site for site in by_place.values()}
        self.leaders = {name: site.module for name, site in first.items()}
        self._blocks = {name: Blocks(site.module) for name, site in first.items()}
        self._sites, self._observer, self._has_statistics = first, observer, has_statistics
        self.seen: Seen = {name: self._empty(name) for name in first}
        readers = [(name, self.seen[site.name]) for name, site in leaders.items()]
        self.observers = {name: s.ranges for name, s in readers if s.ranges is not None}
        self.statistics = {name: seen.statistics for name, seen in readers if seen.statistics}

    def add(
        self,
        seen: Seen,
        name: str,
        arguments: tuple[Any, ...],
        padding: Tensor | None,
        batch: int,
    ) -> None:
        """Add what the layer `name` reads in a batch; of layers that read the same, the first adds.

        Args:
            seen: added to: `self.seen`, or what is known of a part of the data, which is merged
                afterwards.
            name: of the layer; nothing is added of one that is no leader.
            arguments: of the layer's call, the input [..., in] first.
            padding: booleans [rows, tokens], False where a token is padding and does not count.
            batch: the number of the batch, for errors.
        """
        if name not in self.leaders:
            return
        if name not in seen:
            seen[name] = self._empty(name)
        own = seen[name]
        if own.ranges is not None:
            own.ranges.batch = batch
            own.ranges(arguments[0])
        if own.statistics:
            blocks = self._blocks[name]
            assert blocks.form.reads is not None  # lookups are not watched
            reads = blocks.form.reads(blocks.layer, *arguments)
            mask = fitting_mask(padding, reads[0])
            if len(reads) > 1 == len(own.statistics):
                own.statistics[0].add(torch.stack(reads, -2), mask)
            else:
                for x, statistics in zip(reads, own.statistics, strict=True):
                    statistics.add(x, fitting_mask(padding, x))

    def merge(self, seen: Seen) -> None:
        """Add what is known of a part of the data, as if it came after what was seen before."""
        for name, more in seen.items():
            self.seen[name].merge(more)

    def check(self, names: Iterable[str]) -> None:
        """Refuse what cannot be calibrated.

        Raises:
            CalibrationError: one of these layers has read NaN or Inf.
        """
        for name in names:
            if name in self.observers:
                self.observers[name].check()

    def run(self, gm: GraphModule, calls: Sequence[Call], processes: Processes = ALONE) -> None:
        """Run data through the graph that is watched.

        Args:
            gm: the graph.
            calls: batches.
            processes: that share them.

        Raises:
            CalibrationError: a layer has read NaN or Inf, or the graph does not take a batch.
        """
        if not self.leaders:
            return
        parts = [partial(self._seen_in, gm, calls, part) for part in parts_of(len(calls))]
        for seen in processes.in_order(parts):
            self.merge(seen)
        self.check(self.observers)

    @torch.no_grad()
    def _seen_in(self, gm: GraphModule, calls: Sequence[Call], part: range) -> Seen:
        """What layers read in the batches of a part."""
        seen: Seen = {}
        batch, padding = 0, None

        def hook_for(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.add(seen, name, layer_arguments(args, kwargs), padding, batch)

            return hook

        with ExitStack() as undo:
            for name, module in self.leaders.items():
                hook = module.register_forward_pre_hook(hook_for(name), with_kwargs=True)
                undo.callback(hook.remove)
            for batch in part:
                padding = padding_mask(calls[batch])
                run_call(gm, calls[batch], batch)
        return seen

    def _empty(self, name: str) -> SeenInput:
        """What is known of a value before data."""
        site, blocks = self._sites[name], self._blocks[name]
        ranges, statistics = None, list[InputStatistics]()
        if self._observer is not None:
            ranges = _observer_at(site, self._observer)
        if self._has_statistics and blocks.count == 1:
            statistics = [InputStatistics(blocks.inputs)]
        elif self._has_statistics and blocks.form.is_routed:
            numbers = range(blocks.count)
            statistics = [InputStatistics(blocks.inputs, sample_size=0) for _ in numbers]
        elif self._has_statistics:
            statistics = [InputStatistics(blocks.count, blocks.inputs, sample_size=0)]
        return SeenInput(ranges, statistics)


def _observer_at(site: Site, name: str) -> Observer:
    observer = create_observer(name)
    value = f"the input of {site.name}" if site.input is None else f"the value {site.input.name!r}"
    observer.node_name = value
    return observer


def observe_inputs(
    gm: GraphModule, names: Iterable[str], calls: Sequence[Call]
) -> dict[str, InputStatistics]:
    """Run data through a graph and collect statistics of the inputs of its linear layers.

    Args:
        gm: a traced model.
        names: of the layers to watch.
        calls: batches. A two-dimensional `attention_mask` among the keyword arguments masks padding
            out.

    Returns:
        The statistics by the names of blocks of rows (see `block_names`). Layers that share an
        input share the object; it is collected once.
    """
    watcher = InputWatcher(gm, names)
    watcher.run(gm, calls)
    return of_blocks(watcher.statistics)


def of_blocks(statistics: Mapping[str, Sequence[InputStatistics]]) -> dict[str, InputStatistics]:
    """Statistics by the name of a layer, as an `InputWatcher` has them, by the names of blocks."""
    found: dict[str, InputStatistics] = {}
    for name, of_layer in statistics.items():
        blocks = [block for part in of_layer for block in part.by_block()]
        found.update(zip(block_names(name, len(blocks)), blocks, strict=True))
    return found


def expected_inputs(gm: GraphModule) -> Mapping[str, InputStatistics]:
    """What is known without data: the input statistics of layers that follow a norm.

    A norm's output has about the mean of its bias in each channel (zero without one), and the mean
    square of its bias and its weight.

    Args:
        gm: a traced model.

    Returns:
        Statistics without tokens, by the layer's name; only `mean` and `mean_square` are set.
    """
    found = {}
    for site in sites(gm):
        norm = _module_before(site)
        if not is_plain_linear(site.module) or not isinstance(norm, NORMS):
            continue
        if norm.weight is None or tuple(norm.weight.shape) != (site.module.in_features,):
            continue
        found[site.name] = statistics = InputStatistics(site.module.in_features)
        bias = getattr(norm, "bias", None)
        if bias is not None:
            statistics.mean = bias.detach().float()
        statistics.mean_square = norm.weight.detach().float().square() + statistics.mean.square()
    return found


def _module_before(site: Site) -> nn.Module | None:
    source = site.input
    if source is None or source.op != "call_module":
        return None
    return site.gm.get_submodule(str(source.target))
