"""The quantized layers that `static_quantize` would ship, one by one and in either width."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.fx import GraphModule

from fxquant.config.quant_config import QuantConfig
from fxquant.graph.calls import Call
from fxquant.graph.layers import sites
from fxquant.measure.heldout import hold_out
from fxquant.measure.paired_run import output_sqnr
from fxquant.measure.row_parts import takes
from fxquant.modules.layer import QuantizedLayer
from fxquant.passes.decide import Decision
from fxquant.passes.fitted_layers import FittedLayers
from fxquant.passes.observe_inputs import expected_inputs, observe_inputs
from fxquant.passes.quantize_sequentially import quantize_sequentially
from fxquant.passes.rewrite import QuantizeLayer, rewrite
from fxquant.passes.rounded_layers import RoundedLayers

ROUNDINGS = ("auto", "rtn", "hqq", "gptq", "best")


@dataclass(frozen=True)
class ShippedLayers:
    """Layers as a method makes them, and the data that did not choose their integers.

    Attributes:
        quantize: gives the layer of `(name, layer, bits)`.
        rounding: the method that made them; of `"auto"`, the one that it took.
        fitted: the batches that the integers were chosen on.
        held_out: the others, to measure on; all of them where nothing could be held out.
        heldout_samples: rows that were held out.
    """

    quantize: QuantizeLayer
    rounding: str
    fitted: list[Call]
    held_out: list[Call]
    heldout_samples: int


def shipped_layers(
    gm: GraphModule,
    decisions: Sequence[Decision],
    batches: Sequence[Call],
    *,
    rounding: str,
    config: QuantConfig,
) -> ShippedLayers:
    """Make the layers of `decisions` as `static_quantize` does.

    Layers that are fitted to their inputs (`"gptq"`) are made with the layers before them in 4
    bits, whatever width `decisions` asks for.

    Args:
        gm: the float graph.
        decisions: from `decide`; what they leave float is not made.
        batches: calibration data; the last rows are held out.
        rounding: one of `ROUNDINGS`.
        config: how layers are quantized.
    """
    fitted, held_out = hold_out(batches, lambda call: takes(gm, call))
    rows = sum(call.row_count for call in held_out)
    measured = held_out or fitted
    names = [d.module for d in decisions if d.bits is not None]
    expected = expected_inputs(gm)
    statistics = {
        name: seen.steadied(expected.get(name))
        for name, seen in observe_inputs(gm, names, fitted).items()
    }
    plain = "hqq" if rounding == "hqq" else "rtn"
    rounded = RoundedLayers(config, plain, statistics)
    if rounding in ("rtn", "hqq") or not names:
        return ShippedLayers(rounded.quantize, plain, fitted, measured, rows)
    layers = FittedLayers(config, refined=rounding == "best")
    in_4_bits = [replace(d, action="float" if d.bits is None else "int4") for d in decisions]
    qmodel = quantize_sequentially(gm, in_4_bits, fitted, layers.quantize, held_out)
    if rounding == "auto" and held_out:
        nearest = rewrite(gm, in_4_bits, rounded.quantize)
        if output_sqnr(gm, nearest, held_out).db > output_sqnr(gm, qmodel, held_out).db:
            return ShippedLayers(rounded.quantize, "rtn", fitted, measured, rows)
    made = {s.name: s.module for s in sites(qmodel) if isinstance(s.module, QuantizedLayer)}

    def quantize(name: str, layer: nn.Module, bits: int) -> QuantizedLayer:
        found = made.get(name)
        return found if found is not None and found.bits == bits else rounded.quantize(
            name, layer, bits
        )  # fmt: skip

    taken = "gptq" if rounding == "auto" else rounding
    return ShippedLayers(quantize, taken, fitted, measured, rows)
