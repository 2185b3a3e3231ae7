"""Layers fitted to the inputs they see: GPTQ toward the float output, with corrected biases."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.algorithms.gptq import corrected_bias, gptq
from fxquant.algorithms.refine import refine
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.algorithms.target import best_shrinkage
from fxquant.config.quant_config import QuantConfig
from fxquant.modules.layer import QuantizedLayer
from fxquant.numerics.quantized_weight import QuantizedWeight, is_per_channel, rows_of_block
from fxquant.observers.moments import LayerMoments
from fxquant.passes.decide import FELL_BACK, Decision, add_notes
from fxquant.passes.layer_maker import Blocks
from fxquant.passes.rounded_layers import RoundedLayers
from fxquant.passes.target_limits import bias_in_target, exact_in_target, int8_in_target

FITTED_ELEMENTS = 1 << 22  # of a weight that are fitted at once, with some temporaries of the size
COMPARED_OUTPUTS = 128  # of a block, on which fitting and rounding are compared


@dataclass(frozen=True)
class FittedBlock:
    """A block of rows of a layer, and what there is to say of it.

    Attributes:
        weight: its integers; None where the layer is rounded alone.
        bias: [rows], or None.
        is_reached: whether any calibration token reached it.
        is_rounded: whether rounding to nearest was better on tokens that were held out.
        scarce: what to say of few tokens; None where there were enough.
    """

    weight: QuantizedWeight | None
    bias: Tensor | None
    is_reached: bool = True
    is_rounded: bool = False
    scarce: str | None = None


class FittedLayers:
    """Makes quantized layers from weights and the moments of their inputs.

    Args:
        config: how layers are quantized.
        refined: whether integers and scales are then refined in turns.
        bare: names of layers that keep their bias: see `bias_in_target`.
    """

    def __init__(
        self, config: QuantConfig, *, refined: bool = False, bare: Collection[str] = ()
    ) -> None:
        self.config, self.refined, self.bare = config, refined, bare
        self.unreached: Counter[str] = Counter()  # blocks, by the layer's name
        self.rounded: Counter[str] = Counter()
        self.scarce: Counter[str] = Counter()
        self._plain = RoundedLayers(config, bare=bare)
        self._blocks: dict[str, tuple[int, str]] = {}  # how many a layer has, and their word
        self._tokens: dict[str, str] = {}

    def fit(
        self, name: str, blocks: Blocks, index: int, bits: int, moments: LayerMoments
    ) -> FittedBlock:
        """A block of rows, fitted to its inputs, unless the layer is rounded alone.

        Args:
            name: of the layer.
            blocks: of the layer.
            index: of the block.
            bits: of an integer.
            moments: of what the block multiplies.
        """
        if self._plain.is_tied(name, blocks.layer, bits):
            return FittedBlock(None, None, is_reached=bool(moments.tokens))
        matrix, bias = blocks.matrices[index], blocks.biases[index]
        if is_per_channel(bits, self.config.group_size, blocks.inputs):
            weight = int8_in_target(matrix, self.config)
            corrected = corrected_bias(matrix, weight.dequantize(), bias, moments)
            made = self._kept_bias(name, corrected, bias)
            return FittedBlock(weight, made, is_reached=bool(moments.tokens))
        # In float32 even where the caller's autocast is on.
        with torch.autocast(matrix.device.type, enabled=False):
            return self._fit_block(name, matrix, bias, bits, moments)

    def make(
        self, name: str, layer: nn.Module, bits: int, fitted: Sequence[FittedBlock]
    ) -> QuantizedLayer:
        """The layer called `name` in `bits` bits.

        Args:
            name: of the layer.
            layer: a float layer that has a form.
            bits: of an integer.
            fitted: its blocks of rows, in order; none where rows are looked up.
        """
        blocks = Blocks(layer)
        self._blocks[name] = blocks.count, blocks.form.block_word
        for block in fitted:
            self.unreached[name] += not block.is_reached
            self.rounded[name] += block.is_rounded
            self.scarce[name] += block.scarce is not None
            self._tokens[name] = block.scarce or self._tokens.get(name, "")
        weights = [block.weight for block in fitted if block.weight is not None]
        if not weights:
            return self._plain.quantize(name, layer, bits)
        return blocks.joined(weights, [block.bias for block in fitted])

    def _kept_bias(self, name: str, corrected: Tensor | None, own: Tensor | None) -> Tensor | None:
        return bias_in_target(corrected, own, self.config, is_bare=name in self.bare)

    def _fit_block(
        self, name: str, matrix: Tensor, bias: Tensor | None, bits: int, moments: LayerMoments
    ) -> FittedBlock:
        weight = exact_in_target(self._fitted(matrix, bits, moments), matrix, self.config)
        corrected = corrected_bias(matrix, weight.dequantize(), bias, moments)
        fitted = weight, self._kept_bias(name, corrected, bias)
        if not moments.held_tokens or not moments.tokens:
            return FittedBlock(*fitted, is_reached=bool(moments.tokens))
        plain = self._rounded(name, matrix, bias, bits, moments)
        fitted_error, plain_error = moments.held_errors(
            matrix, [_candidate(bias, *made) for made in (fitted, plain)], COMPARED_OUTPUTS
        )
        if plain_error < fitted_error:
            return FittedBlock(*plain, is_rounded=True)
        if moments.tokens >= matrix.shape[1]:
            return FittedBlock(*fitted)
        scarce = (
            f"{moments.tokens} tokens for {matrix.shape[1]} inputs; still better than "
            f"rounding on {moments.held_tokens} tokens held out"
        )
        return FittedBlock(*fitted, scarce=scarce)

    def _fitted(self, matrix: Tensor, bits: int, moments: LayerMoments) -> QuantizedWeight:
        """The weight fitted to the inputs, some outputs at a time: each is on its own."""
        form = self.config.form(bits)
        made = QuantizedWeight.empty(
            matrix, bits=bits, group_size=form["group_size"], symmetric=form["symmetric"],
            code_book=form["code_book"],
        )  # fmt: skip
        shrinkage = best_shrinkage(moments)
        rows = rows_of_block(matrix.shape[1], FITTED_ELEMENTS)
        for number, part in enumerate(made.split(rows)):
            outputs = slice(number * rows, number * rows + len(part.packed))
            target = matrix[outputs].float()
            if shrinkage is not None:
                target = shrinkage.applied(target, moments, outputs)
            weight = gptq(target, moments, bits=bits, **form)
            if self.refined:
                whole = form["integer_zero_points"]
                weight = refine(target, weight, moments, integer_zero_points=whole)
            part.copy_(weight)
        return made

    def _rounded(
        self, name: str, matrix: Tensor, bias: Tensor | None, bits: int, moments: LayerMoments
    ) -> tuple[QuantizedWeight, Any]:
        """The block as `rtn` makes it, which learns less from the data."""
        weight = round_to_nearest(
            matrix, bits=bits, **self.config.form(bits), importance=moments.importance
        )
        weight = exact_in_target(weight, matrix, self.config)
        lost = (matrix.double() - weight.dequantize().double()) @ (moments.total / moments.tokens)
        base = 0 if bias is None else bias.double()
        return weight, self._kept_bias(name, (base + lost).to(matrix.dtype), bias)

    def explain(self, decisions: Iterable[Decision]) -> list[Decision]:
        """The decisions, with a word on layers that were rounded in another way than was asked."""
        rounded = FELL_BACK
        unreached, worse = "no calibration token", "gptq was worse on tokens that were held out"
        for counts, alone, some in (
            (self.unreached, f"{unreached} reached it: {rounded}", f"got {unreached}: {rounded}"),
            (self.rounded, f"{worse}: {rounded}", f"are {rounded}: {worse}"),
            (self.scarce, None, "had fewer tokens than inputs"),
        ):
            notes = {name: self._note(name, n, alone, some) for name, n in counts.items() if n}
            decisions = add_notes(decisions, notes)
        return self._plain.explain(decisions)

    def _note(self, name: str, count: int, alone: str | None, some: str) -> str:
        """What to say of a layer of which `count` blocks are meant."""
        blocks, word = self._blocks[name]
        if blocks == 1:
            return alone or self._tokens[name]
        return f"{count} of {blocks} {word} {some}"


def _candidate(
    bias: Tensor | None, weight: QuantizedWeight, made: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The dequantized weight [rows, inputs], and what the layer adds to the float bias, [rows]."""
    quantized = weight.dequantize()
    base = torch.zeros(len(quantized)) if bias is None else bias
    return quantized, torch.zeros_like(base) if made is None else made - base
