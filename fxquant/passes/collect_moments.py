"""Collect the moments of layers at a turn: what they read, and how far outputs must move."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.graph.layers import Site
from fxquant.observers.moments import InputMoments, LayerMoments, tokens_of
from fxquant.passes.paired_batches import PairedBatch, difference
from fxquant.passes.turns import Turn


def float_linear(site: Site) -> nn.Linear:
    """The layer at a site that was chosen because it is a plain linear layer."""
    assert isinstance(site.module, nn.Linear)
    return site.module


def empty_moments_of(turn: Turn) -> dict[str, LayerMoments]:
    """Moments without tokens of layers that read one value of the graph: they share its moments."""
    linears = {site.name: float_linear(site) for site in turn.sites}
    width = next(iter(linears.values())).in_features
    shared = InputMoments(width, readers=len(linears))
    return {
        name: LayerMoments(width, linear.out_features, shared=shared, weight=linear.weight)
        for name, linear in linears.items()
    }


def collect(turn: Turn, batches: Iterable[PairedBatch]) -> list[LayerMoments]:
    """The moments of layers that read one value of the graph, over some batches.

    How much of an output's shift comes with the input, W (x_float − x), is a product of W and of
    sums over tokens that all layers share. Where outputs are far fewer than inputs, these sums
    would cost more than the shifts themselves.

    Args:
        turn: which layers; not inside an opaque module.
        batches: that have arrived there.

    Returns:
        The moments, in the order of the turn's layers; they hold no weight, see
        `empty_moments_of`.
    """
    linears = {site.name: float_linear(site) for site in turn.sites}
    width = next(iter(linears.values())).in_features
    outputs = sum(m.out_features for name, m in linears.items() if name not in turn.residuals)
    shares_lack = width <= 2 * outputs
    shared = InputMoments(width)
    moments = {
        name: LayerMoments(width, linear.out_features, shared=shared)
        for name, linear in linears.items()
    }
    for batch in batches:
        # In a function of its own, so that nothing of a batch is alive when the next one runs.
        _add_batch(turn, linears, batch, shared, moments, shares_lack=shares_lack)
    return list(moments.values())


def _add_batch(
    turn: Turn,
    linears: Mapping[str, nn.Linear],
    batch: PairedBatch,
    shared: InputMoments,
    moments: Mapping[str, LayerMoments],
    *,
    shares_lack: bool,
) -> None:
    found = batch.values_of(turn.sites[0].input)
    if found is None:
        return
    clean, noisy = found
    mask = batch.mask_for(noisy)
    x = tokens_of(noisy, mask)
    lack = None if torch.equal(clean, noisy) else difference(clean, noisy)
    lack = None if lack is None else tokens_of(lack, mask)
    shifts = _shifts(turn.residuals, linears, batch, noisy, mask)
    if not shares_lack and lack is not None:
        for name, linear in linears.items():
            product = lack @ linear.weight.detach().float().T
            shifts[name] = product.add_(shifts[name]) if name in shifts else product
        lack = None
    _add(shared, moments, x, lack, shifts, is_held_out=batch.is_held_out)


def _add(
    shared: InputMoments,
    moments: Mapping[str, LayerMoments],
    x: Tensor,
    lack: Tensor | None,
    shifts: Mapping[str, Tensor],
    *,
    is_held_out: bool,
) -> None:
    if is_held_out:
        count = shared.hold_out(x, lack)
        for name, own in moments.items():
            own.hold_out_shift(shifts.get(name), count)
        return
    shared.add(x, lack)
    for name, shift in shifts.items():
        moments[name].add_shift(x, shift)


def _shifts(
    residuals: Mapping[str, Node],
    linears: Mapping[str, nn.Linear],
    batch: PairedBatch,
    x: Tensor,
    mask: Tensor | None,
) -> dict[str, Tensor]:
    """The errors of what the layers' outputs are added to, [tokens, out] by name."""
    found = {}
    for name, node in residuals.items():
        values = batch.values_of(node)
        error = None if values is None else difference(*values)
        expected = x.shape[:-1].numel(), linears[name].out_features
        if error is None or (error.shape[:-1].numel(), error.shape[-1]) != expected:
            continue  # it is broadcast, or the output is
        rows = error.reshape(*x.shape[:-1], error.shape[-1])
        found[name] = tokens_of(rows, mask)
    return found
