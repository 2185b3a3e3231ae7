"""The forecast of `quantize_checkpoint`, for a model whose weights stay in their folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fxquant.config.method import Recipe
from fxquant.config.quant_config import QuantConfig
from fxquant.exporters.block_list import BlockList, find_blocks
from fxquant.exporters.model_weights import ModelWeights
from fxquant.exporters.stream import SHARD_BYTES
from fxquant.graph.calls import Call
from fxquant.passes.decide import Decision
from fxquant.planning.forecast import NO_DATA, NO_SHAPES, Forecast, Step
from fxquant.planning.memory import (
    Waiting,
    checking_bytes,
    fitting_bytes,
    peak_bytes,
    statistics_bytes,
    waiting_between,
)
from fxquant.planning.rehearsal import Rehearsal, rehearse
from fxquant.planning.seconds import fitting_steps, rounding_step, running_step
from fxquant.planning.speed import Speed
from fxquant.planning.work import Batches, LayerWork, layers_of
from fxquant.stages import WAITING_SHARE
from fxquant.tracing.opaque import graph_around
from fxquant.tracing.variations import COMPARED_ROWS

TRACING_RUNS = 6  # of a block, on few rows: the block and candidate graphs, at some sizes


@dataclass(frozen=True)
class _Block:
    """The block with most elements to quantize, which stands for all.

    Attributes:
        float_bytes: of its parameters.
        layers: that will be quantized, by name.
        batches: rehearsals of its calls.
        count: how many such blocks have the elements of all.
        handed_on: bytes of what waits between blocks, of all batches.
    """

    float_bytes: int
    layers: Mapping[str, LayerWork]
    batches: Batches
    count: float
    handed_on: int


def forecast_folder(
    model: nn.Module,
    decisions: Sequence[Decision],
    config: QuantConfig,
    recipe: Recipe,
    drawn: Sequence[Call] | None,
    most_bytes: int | None,
) -> Forecast:
    """What `quantize_checkpoint` takes.

    Args:
        model: of the folder's class, with parameters on meta, of the dtypes that the folder has.
        decisions: on its layers.
        config: what is wanted.
        recipe: of its method.
        drawn: the batches; None: without data.
        most_bytes: what `memory` allows.

    Raises:
        OptionError: there are data, and the model has no single list of blocks.
    """
    layers, modules = layers_of(graph_around(model, None), decisions, config)
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    saved = sum(layer.saved_bytes for layer in layers.values())
    made = saved + sum(size for name, size in sizes.items() if _owner(name) not in modules)
    speed = Speed(config, recipe)
    peaks = [min(SHARD_BYTES, sum(sizes.values())) + checking_bytes(layers)]
    writing = Step("writing", sum(map(speed.packing_of, layers.values())), len(layers))
    blocks = None if drawn is None else find_blocks(model, layers)
    block = None
    if blocks is not None:
        has_copies = config.token_noise > 0
        block = _block(model, blocks, layers, drawn or (), has_copies=has_copies)
    if blocks is None or block is None:
        unknown = NO_DATA if drawn is None else NO_SHAPES
        steps = [rounding_step(layers, speed), writing]
        return Forecast(peak_bytes(0, peaks), 0, 0, made, steps, [unknown])
    bound = None if most_bytes is None else int(most_bytes * WAITING_SHARE) // 2
    between, inside = Waiting(block.handed_on, bound), Waiting(0, None)
    if recipe.rounding == "gptq":
        inner = None if bound is None else int(bound * WAITING_SHARE)
        inside = waiting_between(block.batches, inner)
        work = inside.held + fitting_bytes(block.layers, block.batches)
    else:
        work = max(batch.peak for batch in block.batches.all)
        work += statistics_bytes(block.layers, block.batches.readings)
    quantized = sum(layer.saved_bytes for layer in block.layers.values())
    holding = block.float_bytes + quantized + between.held
    outside = sum(size for name, size in sizes.items() if blocks.owner(name) is None)
    peaks += [outside, holding + max(work, checking_bytes(block.layers))]
    rest = {name: layer for name, layer in layers.items() if blocks.owner(name) is None}
    return Forecast(
        peak_bytes(0, peaks),
        between.bytes + inside.bytes,
        between.spilled + inside.spilled,
        made,
        [*_block_steps(block, recipe, speed), *([rounding_step(rest, speed)] if rest else []),
         writing],
    )  # fmt: skip


def _block(
    model: nn.Module,
    blocks: BlockList,
    layers: Mapping[str, LayerWork],
    drawn: Sequence[Call],
    *,
    has_copies: bool,
) -> _Block | None:
    """The block that stands for all; None where the model cannot be rehearsed."""
    elements = [0] * len(blocks)
    for name, layer in layers.items():
        owner = blocks.owner(name)
        if owner is not None:
            elements[owner] += layer.elements
    number = elements.index(max(elements))
    path, block = blocks.name(number), blocks.blocks[number]
    own = {name: layer for name, layer in layers.items() if blocks.owner(name) == number}
    modules = {name: model.get_submodule(name) for name in own}

    def run(call: Call) -> Rehearsal | None:
        way = rehearse(model, call, {}, until=path)
        if way is None or way.reached is None:
            return None
        return rehearse(block, way.reached, modules)

    batches = Batches.of(drawn, run, has_copies=has_copies)
    if batches is None:
        return None
    # What a block is called with, and its main tensor once more: of the quantized model.
    handed_on = sum(batch.given + batch.first for batch in batches.all)
    size = sum(p.nbytes for p in block.parameters())
    return _Block(size, own, batches, sum(elements) / max(elements), handed_on)


def _block_steps(block: _Block, recipe: Recipe, speed: Speed) -> list[Step]:
    """The steps of all blocks."""
    batches = block.batches
    example = batches.all[0]
    few = example.flops * min(example.rows, COMPARED_ROWS) / example.rows
    steps = [running_step("tracing", block.layers, TRACING_RUNS * few, speed)]
    flops = sum(batch.flops for batch in batches.all)
    if recipe.rounding == "gptq":
        steps += fitting_steps(block.layers, batches, speed)
    else:
        statistics = running_step("statistics", block.layers, flops, speed, batches.parts)
        steps += [statistics, rounding_step(block.layers, speed)]
    steps.append(running_step("handing on", block.layers, 2 * flops, speed))
    return [Step(step.name, step.seconds * block.count, step.processes) for step in steps]


def take_dtypes(weights: ModelWeights) -> None:
    """Let parameters on meta have the dtypes of the folder's tensors; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in weights.model.named_modules():
        for name, parameter in module._parameters.items():
            stored = weights.stored.get(f"{path}.{name}" if path else name)
            if parameter is None:
                continue
            if parameter not in made and stored is not None:
                dtype = weights.base.dtype(next(iter(stored.tensors)))
                made[parameter] = nn.Parameter(parameter.to(dtype), requires_grad=False)
            module._parameters[name] = made.get(parameter, parameter)


def _owner(name: str) -> str:
    """Whose weight a tensor is, or its own name."""
    return name.removesuffix(".weight")
