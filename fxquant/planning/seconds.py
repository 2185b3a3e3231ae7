"""How long the steps of a run take, from what they compute and how fast the machine is at that.

Counted are products, rounding and fitting. Not counted is what models do besides (norms, softmax,
attention in one kernel), which is little in models whose layers are wide.
"""

from collections.abc import Mapping, Sequence

from fxquant.distributed.parts import parts_of
from fxquant.planning.forecast import Step
from fxquant.planning.memory import parts_at_once
from fxquant.planning.rehearsal import Rehearsal
from fxquant.planning.speed import Speed
from fxquant.planning.work import Batches, LayerWork

FITTED_ROWS_MEASURED = 2  # runs of as many fitted rows as are held out: float and quantized
HELD_RUNS = 3  # of held-out rows: float, quantized, each layer in float on the quantized input


def fitting_steps(layers: Mapping[str, LayerWork], batches: Batches, speed: Speed) -> list[Step]:
    """Running the batches up to the last layer, summing moments, and solving."""
    typical = _typical(layers)
    # Meanwhile quantized layers multiply in float32, as moments do.
    rate, float_rate = speed.flops(typical), speed.moment_flops(typical)
    products = sum(batch.layers_flops for batch in batches.all)
    sums = 0.0
    for index, reading in enumerate(batches.readings):
        own = [layers[name] for name in reading.layers if name in layers]
        if own:
            sums += batches.tokens(index) * _moment_flops(own, is_first=index == 0)
    solved = [layer for layer in layers.values() if not layer.is_lookup]
    parts = max(1, batches.parts)
    return [
        Step("running batches", products / rate + products / float_rate, parts),
        Step("summing moments", sums / float_rate, parts),
        Step("fitting layers", sum(map(speed.solving, solved)), max(1, len(solved))),
    ]


def _moment_flops(own: Sequence[LayerWork], *, is_first: bool) -> int:
    """Of one token, at layers that read one value."""
    inputs, rows = own[0].inputs, sum(layer.rows for layer in own)
    square = inputs**2  # a symmetric product: half of 2 inputs²
    if is_first:
        return square
    if len(own) == 1:  # the shift of its outputs
        return square + 2 * inputs**2 + 2 * inputs * rows
    return square + min(2 * inputs**2, 4 * inputs * rows)


def running_step(
    name: str, layers: Mapping[str, LayerWork], flops: float, speed: Speed, processes: int = 1
) -> Step:
    """Products in float.

    Args:
        name: of the step.
        layers: that are called.
        flops: floating-point operations.
        speed: of the machine.
        processes: the most that share them.
    """
    return Step(name, flops / speed.flops(_typical(layers)), max(processes, 1))


def rounding_step(layers: Mapping[str, LayerWork], speed: Speed) -> Step:
    """Rounding each layer alone."""
    seconds = sum(map(speed.rounding_of, layers.values()))
    return Step("rounding layers", seconds, max(1, len(layers)))


def measuring_step(
    layers: Mapping[str, LayerWork], batches: Batches, speed: Speed, further_runs: int = 0
) -> Step:
    """The accuracy on held-out rows, and on as many of the fitted ones.

    Args:
        layers: that are quantized.
        batches: of the run.
        speed: of the machine.
        further_runs: of held-out rows through two graphs, to choose between methods.
    """
    typical = _typical(layers)
    rate, quantized_rate = speed.flops(typical), speed.quantized_flops(typical)
    measured = batches.held_out or batches.fitted
    flops, parts = _flops(measured), parts_of(sum(map(parts_at_once, measured)))
    fitted = FITTED_ROWS_MEASURED if batches.held_out else 0
    in_float = HELD_RUNS - 1 + fitted / 2 + further_runs
    quantized = 1 + fitted / 2 + further_runs
    seconds = flops * (in_float / rate + quantized / quantized_rate)
    return Step("measuring", seconds, max(1, len(parts)))


def _flops(batches: Sequence[Rehearsal]) -> int:
    return sum(batch.flops for batch in batches)


def _typical(layers: Mapping[str, LayerWork]) -> LayerWork:
    """The largest layer: most of the work is in layers of its kind."""
    return max(layers.values(), key=lambda layer: layer.rows * layer.inputs)
