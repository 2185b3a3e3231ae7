"""Moments of layers that run inside an opaque module, whose own code calls them.

The module runs, on clones of its inputs, up to the layer whose turn it is, once for each group of
layers that read the same value: what a layer is fitted to comes from the quantized ones before it.
Of more than `MOST_RUNS` groups neighbours are taken together, so that the time does not grow with
the square of the number of layers.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from fxquant.graph.calls import Call
from fxquant.graph.interpreter import writable
from fxquant.graph.layers import Site, layer_input
from fxquant.graph.left_alone import left_alone
from fxquant.graph.stepper import Stepper
from fxquant.observers.moments import LayerMoments
from fxquant.passes.block_moments import add_call, empty_moments, lacking_output
from fxquant.passes.layer_maker import Blocks
from fxquant.passes.paired_batches import PairedBatch
from fxquant.passes.turns import Turn

MOST_RUNS = 12  # of an opaque module, on each batch and in either graph
# Of the arguments that a layer is called with in the float model.
Notice = Callable[[str, tuple[Tensor, ...], PairedBatch], None]


@dataclass(frozen=True)
class OpaqueGroup:
    """Layers of an opaque module that are fitted together, and how often it calls each."""

    sites: list[Site]
    counts: dict[str, int]

    @cached_property
    def blocks(self) -> dict[str, Blocks]:
        """The blocks of rows of each layer, by name."""
        return {site.name: Blocks(site.module) for site in self.sites}

    @property
    def calls(self) -> int:
        """How many calls of these layers there are in a run of the module."""
        return sum(self.counts.get(site.name, 0) for site in self.sites)


@dataclass
class _Seen:
    """What a layer read during one batch, call by call, in either graph."""

    clean: list[Tensor] = field(default_factory=list)
    noisy: list[Tensor] = field(default_factory=list)


def groups_inside(turn: Turn, first: PairedBatch | None) -> list[OpaqueGroup]:
    """The layers of an opaque module in the order of its calls, those of one input together.

    Neighbours are together, too, where there are more groups than `MOST_RUNS`.

    Args:
        turn: all of them.
        first: a batch that has arrived at the module, to see the order.
    """
    groups: list[list[Site]] = []
    counts: dict[str, int] = defaultdict(int)
    # What the last group read. It is held, as the memory of a freed tensor is soon another's,
    # and an address would then say that two layers read the same.
    last: Tensor | None = None
    version = 0

    def note(site: Site) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            nonlocal last, version
            counts[site.name] += 1
            if counts[site.name] > 1:
                return
            x = layer_input(args, kwargs)
            if last is not None and x.is_set_to(last) and x._version == version:
                groups[-1].append(site)
            else:
                groups.append([site])
                last, version = x, x._version

        return hook

    if first is not None:
        hooks = {site.module: note(site) for site in turn.sites}
        _run_node(first.noisy, turn.node, first.noisy_values, hooks)
    rest = [site for site in turn.sites if site.name not in counts]
    size = ceil(len(groups) / MOST_RUNS) or 1
    together = [list(chain(*groups[i : i + size])) for i in range(0, len(groups), size)]
    return [OpaqueGroup(group, counts) for group in (*together, rest) if group]


def collect_inside(
    group: OpaqueGroup,
    partners: dict[str, nn.Module],
    notice: Notice,
    batches: Iterable[PairedBatch],
) -> list[LayerMoments]:
    """The moments of a group of layers over some batches: of each block, in the group's order.

    Args:
        group: which layers.
        partners: the same layers in the float graph, by name.
        notice: is told what each layer reads in the float graph, of batches that are fitted to.
        batches: that have arrived at the module.
    """
    moments = {name: empty_moments(own, range(own.count)) for name, own in group.blocks.items()}
    for batch in batches if group.calls else ():
        seen = {site.name: _Seen() for site in group.sites}
        clean, noisy = _Countdown(group.calls), _Countdown(group.calls)
        node = group.sites[0].node
        hooks = {partners[name]: clean.noting(s.clean) for name, s in seen.items()}
        _run_node(batch.clean, batch.partner(node), batch.clean_values, hooks)
        hooks = {site.module: noisy.noting(seen[site.name].noisy) for site in group.sites}
        _run_node(batch.noisy, node, batch.noisy_values, hooks)
        for site in group.sites:
            what = seen[site.name]
            _add(moments[site.name], group.blocks[site.name], what, batch)
            for x in () if batch.is_held_out else what.clean:
                notice(site.name, (x,), batch)
    return [own for site in group.sites for own in moments[site.name]]


def _add(moments: Sequence[LayerMoments], blocks: Blocks, seen: _Seen, batch: PairedBatch) -> None:
    # The module may call the layer a different number of times: then nothing matches.
    are_matched = len(seen.clean) == len(seen.noisy)
    cleans: Sequence[Tensor | None] = seen.clean if are_matched else [None] * len(seen.noisy)
    for x, clean in zip(seen.noisy, cleans, strict=True):
        add_call(
            moments, blocks, range(blocks.count), (x,), lacking_output(blocks, clean, (x,)),
            batch.padding, is_held_out=batch.is_held_out,
        )  # fmt: skip


class _StopError(BaseException):
    """Ends a run inside an opaque module; no `except Exception` of its code catches it."""


class _Countdown:
    """Hooks that note what layers read, and end the run after the last call."""

    def __init__(self, expected: int) -> None:
        self.left = expected

    def noting(self, inputs: list[Tensor]) -> Any:
        """A hook that notes clones: the module's code may write into what it gets."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            inputs.append(layer_input(args, kwargs).clone())
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
