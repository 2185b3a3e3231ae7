"""Scale channels so that rounding costs less, and fold the scales into the graph.

before: `h = norm(x); q = q_proj(h); k = k_proj(h)`
after:  the same nodes, with the norm's weight divided by a scale s for each channel, and the
        columns of both projections multiplied by it

What can be scaled is found in the graph (see `graph/channel_scaling.py`); the scale is searched in
a family of candidates, and kept only if the layers' outputs come out better with it:

- `awq` (Lin et al., arXiv:2306.00978): s = mean |x| to a power; channels with large activations
  get weights with finer steps.
- `smoothquant` (Xiao et al., arXiv:2211.10438): s = max |x| to a power over max |W| to the rest;
  outliers of activations move into the weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph.calls import Call
from fxquant.graph.channel_scaling import Scaling, ScalingFinder, apply_scale
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.layers import Site, sites
from fxquant.graph.scale_rules import CannotScaleError
from fxquant.observers.input_statistics import InputStatistics
from fxquant.passes.decide import Decision, add_notes
from fxquant.passes.observe_inputs import observe_inputs

POWERS = tuple(i / 20 for i in range(1, 21))
TRUSTED_TOKENS = 32  # a handful of tokens says little about how channels differ
LEAST_GAIN = 0.01  # of the squared error: less is noise of the sample

RoundWeight = Callable[[Tensor, int], Tensor]
RoundActivation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FoldedScale:
    """A scale that was folded into a graph.

    Attributes:
        producers: names of what was divided by it.
        readers: names of the linear layers that were multiplied.
        kind: `"awq"` or `"smoothquant"`.
        power: the one that was best.
        gain_db: by how much the readers' outputs are nearer to the float ones, on a sample.
    """

    producers: tuple[str, ...]
    readers: tuple[str, ...]
    kind: str
    power: float
    gain_db: float


@dataclass(frozen=True)
class ScaledGraph:
    """What `scale_channels` made.

    Attributes:
        gm: the graph; it computes what it did before.
        folded: the scales in it.
        notes: a word for the decisions on each quantized layer, by name.
    """

    gm: GraphModule
    folded: list[FoldedScale]
    notes: dict[str, str]

    def explain(self, decisions: Iterable[Decision]) -> list[Decision]:
        """The decisions with the notes in their reasons."""
        return add_notes(decisions, self.notes)


@torch.no_grad()
def scale_channels(
    gm: GraphModule,
    decisions: Iterable[Decision],
    calls: Sequence[Call],
    kinds: Sequence[str],
    round_weight: RoundWeight,
    round_activation: RoundActivation | None = None,
) -> ScaledGraph:
    """Search and fold scales for the inputs of all layers that will be quantized.

    Args:
        gm: a traced model; it is not changed.
        decisions: from `decide`.
        calls: batches as `(args, kwargs)`.
        kinds: `"awq"`, `"smoothquant"` or both, in order.
        round_weight: from a weight [out, in] and bits to what the quantized layer will hold.
        round_activation: from inputs [tokens, in] to what the quantized layer will see; None where
            activations stay float.

    Returns:
        A graph with other parameters and the same nodes.
    """
    bits = {d.module: d.bits for d in decisions if d.bits is not None}
    scaled = copy_sharing_tensors(gm, frozen=True)
    found, notes = _find_scalings(scaled, bits, calls)
    watched = {name for scaling, _ in found for name, _, _ in scaling.readers if name in bits}
    statistics = observe_inputs(scaled, watched, calls)
    folded: list[FoldedScale] = []
    for scaling, names in found:
        layers = [(n, m, c) for n, m, c in scaling.readers if n in bits and n in statistics]
        search = _SettingSearch(scaling, layers, statistics, bits, round_weight, round_activation)
        remarks = []
        for kind in kinds:
            best = search.best(kind)
            if best is None:
                remarks.append(f"{kind}: no scale is better than none")
                continue
            scale, power, gain = best
            apply_scale(scaling, scale)
            search.divide(scale)
            readers = tuple(name for name, _, _ in scaling.readers)
            folded.append(FoldedScale(tuple(scaling.producers), readers, kind, power, gain))
            remarks.append(
                f"{kind}: scaled, folded into {', '.join(scaling.producers)} ({gain:+.1f} dB)"
            )
        notes |= dict.fromkeys(names, "; ".join(remarks))
    return ScaledGraph(scaled, folded, {n: note for n, note in notes.items() if n in bits})


def _find_scalings(
    gm: GraphModule, bits: Mapping[str, int], calls: Sequence[Call]
) -> tuple[list[tuple[Scaling, list[str]]], dict[str, str]]:
    """Each scaling once, with the layers it serves; for all other layers, why there is none."""
    finder = ScalingFinder(gm, calls[0])
    found: list[tuple[Scaling, list[str]]] = []
    notes: dict[str, str] = {}
    served: set[str] = set()
    for site in sites(gm):
        if site.name not in bits or site.name in served | set(notes):
            continue
        try:
            scaling = finder.find(_input_of(site))
        except CannotScaleError as error:
            notes[site.name] = f"no scale: {error}"
            continue
        names = [name for name, _, _ in scaling.readers if name in bits]
        found.append((scaling, names))
        served |= set(names)
    return found, notes


def _input_of(site: Site) -> Node:
    if site.is_inside:
        raise CannotScaleError("it runs inside a module that could not be traced")
    if site.input is None:
        raise CannotScaleError("its input is no value of the graph")
    return site.input


class _SettingSearch:
    """Tries scales of one scaling on samples of its layers' inputs."""

    def __init__(
        self,
        scaling: Scaling,
        layers: Sequence[tuple[str, nn.Linear, Tensor]],
        statistics: Mapping[str, InputStatistics],
        bits: Mapping[str, int],
        round_weight: RoundWeight,
        round_activation: RoundActivation | None,
    ) -> None:
        self.scaling, self.layers, self.bits = scaling, layers, bits
        self.round_weight, self.round_activation = round_weight, round_activation
        self.samples = {name: statistics[name].sample for name, _, _ in layers}
        self.mean_abs = {n: _steadied(statistics[n].mean_abs, statistics[n]) for n, _, _ in layers}
        self.largest = {n: _steadied(statistics[n].largest, statistics[n]) for n, _, _ in layers}

    def best(self, kind: str) -> tuple[Tensor, float, float] | None:
        """The best scale [channels], its power and gain in dB; None where 1 is as good."""
        if not self.layers or not any(len(s) for s in self.samples.values()):
            return None
        plain = self._error(torch.ones(self.scaling.channels))
        tried = [(self._error(s), power, s) for power, s in self._candidates(kind)]
        error, power, scale = min(tried, key=lambda entry: entry[0])
        if not error < plain * (1 - LEAST_GAIN):
            return None
        return scale, power, 10 * float(torch.log10(torch.tensor(plain / max(error, 1e-300))))

    def divide(self, scale: Tensor) -> None:
        """The inputs have been divided by `scale`."""
        for name, _, channel in self.layers:
            own = _at(scale, channel)
            self.samples[name] = self.samples[name] / own
            self.mean_abs[name] = self.mean_abs[name] / own
            self.largest[name] = self.largest[name] / own

    def _candidates(self, kind: str) -> Iterator[tuple[float, Tensor]]:
        if kind == "awq":
            x, w = self._per_channel(self.mean_abs), torch.ones(self.scaling.channels)
        else:
            x = self._per_channel(self.largest)
            w = self._per_channel(
                {name: m.weight.detach().float().abs().amax(0) for name, m, _ in self.layers}
            )
        for power in POWERS:
            scale = x**power if kind == "awq" else x**power / w ** (1 - power)
            scale = scale / scale.log().mean().exp()
            if torch.isfinite(scale).all() and bool((scale > 0).all()):
                yield power, scale

    def _per_channel(self, values: Mapping[str, Tensor]) -> Tensor:
        """The largest value of each channel over all layers and tied channels, [channels]."""
        groups = self.scaling.group_of
        largest = torch.zeros(int(groups.max()) + 1)
        for name, _, channel in self.layers:
            taking_part = channel >= 0
            index = groups[channel[taking_part]]
            largest.scatter_reduce_(0, index, values[name][taking_part], "amax")
        largest = largest.clamp(min=float(largest.max()) * 1e-4)  # a dead channel is no reason
        return largest.clamp(min=torch.finfo(torch.float32).tiny)[groups]

    def _error(self, scale: Tensor) -> float:
        """The summed squared error of all layers' outputs on their samples."""
        total = 0.0
        for name, linear, channel in self.layers:
            own, x = _at(scale, channel), self.samples[name]
            weight = linear.weight.detach().float()
            seen = x / own if self.round_activation is None else self.round_activation(x / own)
            rounded = self.round_weight(weight * own, self.bits[name])
            difference = seen @ rounded.T - x @ weight.T
            total += float(difference.double().square().sum())
        return total


def _steadied(values: Tensor, statistics: InputStatistics) -> Tensor:
    """Magnitudes of channels as if a few more tokens had the average one everywhere."""
    if not statistics.tokens:
        return torch.ones_like(values)
    seen = statistics.tokens / (statistics.tokens + TRUSTED_TOKENS)
    return torch.lerp(values.mean(), values, seen)


def _at(scale: Tensor, channel: Tensor) -> Tensor:
    return torch.where(channel >= 0, scale[channel.clamp(min=0)], 1.0)
