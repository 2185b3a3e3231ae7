"""Collect statistics of the inputs of linear layers, from data or from what a graph promises."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph.calls import Call
from fxquant.graph.layers import Site, is_plain_linear, layer_input, sites
from fxquant.observers.input_statistics import InputStatistics
from fxquant.passes.calibrate import run_call
from fxquant.passes.padding import fitting_mask, padding_mask

NORMS = (nn.LayerNorm, nn.RMSNorm)


@torch.no_grad()
def observe_inputs(
    gm: GraphModule, names: Iterable[str], calls: Sequence[Call]
) -> dict[str, InputStatistics]:
    """Run data through a graph and watch the inputs of its linear layers.

    Args:
        gm: a traced model.
        names: of the layers to watch.
        calls: batches as `(args, kwargs)`. A two-dimensional `attention_mask` among the keyword
            arguments masks padding out.

    Returns:
        The statistics by name. Layers that share an input share the object; it is collected once.
    """
    wanted, found = set(names), dict[str, InputStatistics]()
    by_input: dict[tuple[object, ...], InputStatistics] = {}
    watched: dict[nn.Module, InputStatistics] = {}
    for site in sites(gm):
        if site.name not in wanted or not is_plain_linear(site.module):
            continue
        statistics = by_input.setdefault(
            _input_of(site), watched.get(site.module) or InputStatistics(site.module.in_features)
        )
        if statistics not in watched.values():
            watched[site.module] = statistics
        found.setdefault(site.name, statistics)
    mask: Tensor | None = None

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = layer_input(args, kwargs)
        watched[module].add(x, fitting_mask(mask, x))

    if not watched:
        return found
    handles = [m.register_forward_pre_hook(watch, with_kwargs=True) for m in watched]
    try:
        for index, call in enumerate(calls):
            mask = padding_mask(call)
            run_call(gm, call, index)
    finally:
        for handle in handles:
            handle.remove()
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


def _input_of(site: Site) -> tuple[object, ...]:
    return (site.input,) if site.input is not None else (site.target,)
