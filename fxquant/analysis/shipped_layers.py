"""The quantized layers that `static_quantize` would ship, one by one and in every width."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.fx import GraphModule

from fxquant.calibration import watched
from fxquant.config.method import parse_method
from fxquant.config.quant_config import QuantConfig
from fxquant.distributed.processes import ALONE, Processes
from fxquant.graph.calls import Call
from fxquant.graph.layers import sites
from fxquant.measure.heldout import hold_out
from fxquant.measure.row_parts import takes
from fxquant.modules.layer import QuantizedLayer
from fxquant.passes.decide import Decision
from fxquant.passes.pack_parameters import bare_layers
from fxquant.passes.rewrite import QuantizeLayer
from fxquant.passes.rounded_layers import RoundedLayers
from fxquant.stages import make_layers


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
    processes: Processes = ALONE,
    widths: Sequence[int] = (),
) -> ShippedLayers:
    """Make the layers of `decisions` as `static_quantize` does.

    Layers that are fitted to their inputs (`"gptq"`) are made with the layers before them in 4
    bits, whatever width `decisions` asks for; those of other widths are fitted to the same inputs.

    Args:
        gm: the float graph.
        decisions: from `decide`; what they leave float is not made.
        batches: calibration data; the last rows are held out.
        rounding: one of `UNSCALED`.
        config: how layers are quantized.
        processes: that share the work.
        widths: bits that layers will be asked for besides those of `decisions`.
    """
    recipe = parse_method(rounding, has_data=True)
    config = config.changed(method=rounding)
    fitted, held_out = hold_out(batches, lambda call: takes(gm, call))
    rows = sum(call.row_count for call in held_out)
    measured = held_out or fitted
    calibrated = watched(gm, list(decisions), fitted, held_out, config, recipe, processes=processes)
    in_4_bits = [replace(d, action="float" if d.bits is None else "int4") for d in decisions]
    made: dict[tuple[str, int], QuantizedLayer] = {}
    if recipe.rounding == "gptq":
        asked = {*widths, *(d.bits for d in decisions if d.bits is not None)} - {4}
        shipped = make_layers(
            replace(calibrated, decisions=in_4_bits), config, recipe, also=sorted(asked)
        )
        recipe = shipped.recipe
        if recipe.rounding == "gptq":
            found = ((site.name, site.module) for site in sites(shipped.gm))
            made = {(name, m.bits): m for name, m in found if isinstance(m, QuantizedLayer)}
            made |= shipped.others
    plain = "hqq" if recipe.rounding == "hqq" else "rtn"
    rounded = RoundedLayers(config, plain, calibrated.inputs, bare=bare_layers(gm))

    def quantize(name: str, layer: nn.Module, bits: int) -> QuantizedLayer:
        own = made.get((name, bits))
        return rounded.quantize(name, layer, bits) if own is None else own

    taken = recipe.rounding if rounding == "auto" else rounding
    return ShippedLayers(quantize, taken, fitted, measured, rows)
