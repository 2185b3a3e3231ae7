"""The forecast of `quantize`, for a model that was traced."""

from collections.abc import Sequence

from torch.fx import GraphModule

from fxquant.config.method import Recipe
from fxquant.config.quant_config import QuantConfig
from fxquant.graph.calls import Call
from fxquant.passes.calibrate import naming_batch
from fxquant.passes.decide import Decision
from fxquant.planning.forecast import (
    NO_DATA,
    NO_EXAMPLE,
    NO_SEARCH,
    NO_SHAPES,
    Forecast,
    Step,
)
from fxquant.planning.memory import (
    Waiting,
    checking_bytes,
    fitting_bytes,
    measuring_bytes,
    peak_bytes,
    statistics_bytes,
    tracing_bytes,
    waiting_between,
)
from fxquant.planning.rehearsal import Rehearsal, rehearse
from fxquant.planning.seconds import fitting_steps, measuring_step, rounding_step, running_step
from fxquant.planning.speed import Speed
from fxquant.planning.work import Batches, float_bytes, layers_of
from fxquant.stages import WAITING_SHARE


def forecast_graph(
    gm: GraphModule,
    decisions: Sequence[Decision],
    config: QuantConfig,
    recipe: Recipe,
    example: Call | None,
    drawn: Sequence[Call] | None,
    most_bytes: int | None,
    tracing_seconds: float,
) -> Forecast:
    """What `quantize` takes.

    Args:
        gm: the traced model.
        decisions: on its layers.
        config: what is wanted.
        recipe: of its method.
        example: what the model was traced with, or None.
        drawn: the batches; None: without data.
        most_bytes: what `memory` allows.
        tracing_seconds: how long tracing took.
    """
    layers, modules = layers_of(gm, decisions, config)
    kept_float = float_bytes(gm, modules)
    made = sum(layer.saved_bytes for layer in layers.values()) + kept_float
    run = None if example is None else rehearse(gm, example, modules)
    tracing = 0 if run is None else tracing_bytes(run)
    is_fitted, batches = recipe.rounding == "gptq", None
    if drawn:

        def run_one(call: Call) -> Rehearsal | None:
            with naming_batch(gm, lambda: call):
                return rehearse(gm, call, modules)

        batches = Batches.of(drawn, run_one, has_copies=config.token_noise > 0)
    unknown = [NO_EXAMPLE] * (example is None) + [NO_DATA] * (drawn is None)
    unknown += [NO_SHAPES] * (drawn is not None and batches is None)
    unknown += [NO_SEARCH] * bool(recipe.scalings)
    steps = [Step("tracing", tracing_seconds)]
    speed = Speed(config, recipe)
    if batches is None or not layers:
        steps += [rounding_step(layers, speed)] if layers else []
        peak = max(peak_bytes(made, [checking_bytes(layers)]), peak_bytes(0, [tracing]))
        return Forecast(peak, 0, 0, made, steps, unknown)
    waiting = Waiting(0, None)
    is_compared = config.method == "auto" and bool(batches.held_out)
    peaks = [measuring_bytes(batches) + made * is_compared]
    if is_fitted:
        bound = None if most_bytes is None else int(most_bytes * WAITING_SHARE)
        waiting = waiting_between(batches, bound)
        # What stays float is copied when all layers have been fitted.
        peaks.append(waiting.held + fitting_bytes(layers, batches) - kept_float)
        steps += fitting_steps(layers, batches, speed)
    else:
        flops = sum(batch.flops for batch in batches.fitted)
        peaks += [max(batch.peak for batch in batches.all), checking_bytes(layers)]
        steps.append(running_step("statistics", layers, flops, speed, batches.parts))
    if not is_fitted or is_compared:
        steps.append(rounding_step(layers, speed))
    steps.append(measuring_step(layers, batches, speed, int(is_compared)))
    is_collecting = not is_fitted or config.method == "auto" or bool(config.activation_bits)
    kept = statistics_bytes(layers, batches.readings) if is_collecting else 0
    peak = max(peak_bytes(made + kept, peaks), peak_bytes(0, [tracing]))
    return Forecast(peak, waiting.bytes, waiting.spilled, made, steps, unknown)
