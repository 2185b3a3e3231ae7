"""Moments of layers that run inside an opaque module, whose own code calls them.

The module runs, on clones of its inputs, up to the layer whose turn it is, once for each group of
layers that read the same value.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
from fxquant.passes.collect_moments import float_linear, lacking_output
from fxquant.passes.paired_batches import PairedBatch
from fxquant.passes.turns import Turn

# Of the arguments that a layer is called with in the float model.
Notice = Callable[[str, tuple[Tensor, ...], PairedBatch], None]


@dataclass(frozen=True)
class OpaqueGroup:
    """Layers of an opaque module that read one value, and how often it calls each."""

    sites: list[Site]
    counts: dict[str, int]

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
    return [OpaqueGroup(group, counts) for group in (*groups, rest) if group]


def collect_inside(
    group: OpaqueGroup,
    partners: dict[str, nn.Module],
    notice: Notice,
    batches: Iterable[PairedBatch],
) -> list[LayerMoments]:
    """The moments of a group of layers over some batches, in the order of the group.

    Args:
        group: which layers.
        partners: the same layers in the float graph, by name.
        notice: is told what each layer reads in the float graph, of batches that are fitted to.
        batches: that have arrived at the module.
    """
    linears = {site.name: float_linear(site) for site in group.sites}
    moments = {n: LayerMoments(m.in_features, m.out_features) for n, m in linears.items()}
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
            _add(moments[site.name], linears[site.name], what, batch)
            for x in () if batch.is_held_out else what.clean:
                notice(site.name, (x,), batch)
    return list(moments.values())


def _add(moments: LayerMoments, linear: nn.Linear, seen: _Seen, batch: PairedBatch) -> None:
    # The module may call the layer a different number of times: then nothing matches.
    are_matched = len(seen.clean) == len(seen.noisy)
    cleans: Sequence[Tensor | None] = seen.clean if are_matched else [None] * len(seen.noisy)
    for x, clean in zip(seen.noisy, cleans, strict=True):
        add = moments.hold_out if batch.is_held_out else moments.add
        add(x, lacking_output(linear, clean, x), batch.mask_for(x))


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
