"""What each layer takes in a file at each width that it can have."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.fx import GraphModule

from fxquant.analysis.candidates import Candidate
from fxquant.config.option_checks import FLOAT_BITS
from fxquant.config.quant_config import QuantConfig
from fxquant.measure.sensitivity_row import SensitivityRow
from fxquant.measure.sizes import model_bytes
from fxquant.modules.weight_forms import matrix_of
from fxquant.numerics.integers import INT8
from fxquant.numerics.quantized_weight import (
    SCALE_DTYPE,
    is_per_channel,
    resolved_group_size,
    saved_bytes,
)
from fxquant.passes.rewrite import QuantizeLayer


def with_sizes(
    gm: GraphModule,
    rows: Sequence[SensitivityRow],
    candidates: Sequence[Candidate],
    widths: Sequence[int],
    quantize: QuantizeLayer,
    config: QuantConfig,
    norm_bytes: Mapping[str, int],
) -> list[SensitivityRow]:
    """The rows with `saved_bytes`: of the integers, their scales and zero points, and the bias.

    A layer with fewer inputs than a group has 8 bits or stays float. A weight that several layers
    share counts for the first of them, and one that another part of the graph holds too is there
    anyway: the layer costs nothing for it while it is float.

    Args:
        gm: the float graph.
        rows: of the layers, each at one width.
        candidates: the float layers.
        widths: to choose from.
        quantize: gives the layers of `rows`, which tell what they hold besides the weight.
        config: how layers are quantized.
        norm_bytes: what a layer takes more while it is float, since its norm is not folded then.
    """
    layers = {candidate.name: candidate.layer for candidate in candidates}
    own = set(layers.values())
    kept = {
        p.data_ptr()
        for m in gm.modules()
        if m not in own
        for p in m._parameters.values()
        if p is not None
    }
    found = []
    for row in rows:
        layer = layers[row.module]
        sizes = _sizes(row, layer, widths, quantize, config)
        weight = layer.get_parameter("weight")
        is_there = bool(row.shares_weight) or weight.data_ptr() in kept
        shared = is_there * weight.numel() * weight.element_size()
        sizes[FLOAT_BITS] = model_bytes(layer) - shared + norm_bytes.get(row.module, 0)
        found.append(replace(row, saved_bytes=sizes))
    return found


def _sizes(
    row: SensitivityRow,
    layer: nn.Module,
    widths: Sequence[int],
    quantize: QuantizeLayer,
    config: QuantConfig,
) -> dict[int, int]:
    """By the widths of integers."""
    own = 0 if row.shares_weight else 1
    beside = model_bytes(quantize(row.module, layer, row.bits)) - weight_bytes(
        layer, row.bits, config
    )
    group_size, inputs = config.group_size, matrix_of(layer).shape[1]
    possible = [b for b in widths if b == INT8.bits or not is_per_channel(b, group_size, inputs)]
    return {b: beside + own * weight_bytes(layer, b, config) for b in possible or [INT8.bits]}


def weight_bytes(layer: nn.Module, bits: int, config: QuantConfig) -> int:
    """Of the weight's integers, scales and zero points."""
    rows, inputs = matrix_of(layer).shape
    if is_per_channel(bits, config.group_size, inputs):
        return rows * inputs + SCALE_DTYPE.itemsize * rows
    group_size = resolved_group_size(config.group_size, inputs)
    return saved_bytes((rows, inputs), bits, group_size, config.symmetric)
