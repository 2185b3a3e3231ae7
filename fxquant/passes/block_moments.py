"""The moments of the blocks of rows of a layer, from the arguments of its calls."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from fxquant.modules.weight_forms import with_weight
from fxquant.observers.moments import LayerMoments
from fxquant.passes.layer_maker import Blocks
from fxquant.passes.padding import fitting_mask
from fxquant.passes.paired_batches import PairedBatch, difference
from fxquant.passes.turns import Turn

AT_ONCE = 1 << 29  # bytes of the moments of blocks that are collected together


def collect_blocks(
    turn: Turn, blocks: Blocks, chosen: range, batches: Iterable[PairedBatch]
) -> list[LayerMoments]:
    """The moments of some blocks of rows of a layer, over some batches.

    Args:
        turn: of a single layer, not inside an opaque module.
        blocks: of the layer.
        chosen: which of them are meant.
        batches: that have arrived there.
    """
    moments = empty_moments(blocks, chosen)
    for batch in batches:
        arguments = batch.arguments(turn.node)
        if arguments is not None:
            shift = _shift(blocks, turn, batch, *arguments)
            add_call(
                moments, blocks, chosen, arguments[1], shift, batch.padding,
                is_held_out=batch.is_held_out,
            )  # fmt: skip
    return moments


def _shift(
    blocks: Blocks,
    turn: Turn,
    batch: PairedBatch,
    clean: tuple[Any, ...],
    noisy: tuple[Any, ...],
) -> Tensor | None:
    """What the output lacks, and the error of what it is added to."""
    shift = lacking_output(blocks, clean[0], noisy)
    values = batch.values_of(turn.residuals.get(turn.sites[0].name))
    error = None if shift is None or values is None else difference(*values)
    return shift if shift is None or error is None or error.shape != shift.shape else shift + error


def lacking_output(blocks: Blocks, clean: Tensor | None, noisy: tuple[Any, ...]) -> Tensor | None:
    """W (x_float − x) of a layer, in the shape of its output.

    Args:
        blocks: of the layer.
        clean: what it reads in the float graph, or None.
        noisy: the arguments of its call in the other graph.

    Returns:
        None where nothing lacks, where the float input is unknown or has another shape, and where
        outputs of two runs cannot be compared.
    """
    lack = None if blocks.form.gives is None else difference(clean, noisy[0])
    if lack is None:
        return None
    weight = blocks.layer.get_parameter("weight").detach()
    return with_weight(blocks.layer, weight, (lack.to(weight.dtype), *noisy[1:])).float()


def slice_of(chosen: range) -> slice:
    """The slice of a sequence that a range of places without gaps means."""
    return slice(chosen.start, chosen.stop)


def chunks_of_blocks(blocks: Blocks) -> list[range]:
    """The blocks of a layer in runs whose moments fit into `AT_ONCE`; none for a lookup.

    Two of each are held: of all batches, and of the part of them that is in work.
    """
    if blocks.form.is_lookup:
        return []
    size = max(1, AT_ONCE // (2 * LayerMoments.bytes_of(blocks.inputs, blocks.rows)))
    return [range(i, min(i + size, blocks.count)) for i in range(0, blocks.count, size)]


def empty_moments(blocks: Blocks, chosen: range) -> list[LayerMoments]:
    """Moments without tokens for each of the chosen blocks."""
    return [LayerMoments(blocks.inputs, blocks.rows) for _ in chosen]


def add_call(
    moments: Sequence[LayerMoments],
    blocks: Blocks,
    chosen: range,
    arguments: tuple[Any, ...],
    shift: Tensor | None,
    mask: Tensor | None,
    *,
    is_held_out: bool = False,
) -> None:
    """Add what a layer read in one call.

    Args:
        moments: of the chosen blocks.
        blocks: of the layer.
        chosen: which blocks are meant.
        arguments: of the call.
        shift: what the output lacks, in its shape; None where that is not known.
        mask: of the tokens that are no padding, or None.
        is_held_out: whether these tokens may choose nothing.
    """
    form, layer = blocks.form, blocks.layer
    assert form.reads is not None  # no moments belong to a lookup
    reads = form.reads(layer, *arguments)
    shifts = None
    if shift is not None and form.gives is not None:
        shifts = form.gives(layer, shift, *arguments)
    for seen, block in zip(moments, chosen, strict=True):
        x = reads[block]
        add = seen.hold_out if is_held_out else seen.add
        add(x, None if shifts is None else shifts[block], fitting_mask(mask, x))
