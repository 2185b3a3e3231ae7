"""What a run has to do: its layers, and what the data are to them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule

from fxquant.analysis.saved_sizes import weight_bytes
from fxquant.config.quant_config import QuantConfig
from fxquant.distributed.parts import parts_of
from fxquant.graph.calls import Call
from fxquant.graph.layers import sites
from fxquant.graph.parameters import memory_of
from fxquant.measure.heldout import hold_out
from fxquant.modules.weight_forms import chosen_form, form_of, matrix_of
from fxquant.passes.decide import Decision
from fxquant.passes.token_noise import COPIED
from fxquant.planning.rehearsal import Reading, Rehearsal


@dataclass(frozen=True)
class LayerWork:
    """A layer that will be quantized.

    Attributes:
        rows: of a block of its weight [rows, inputs].
        inputs: of a block.
        blocks: how many there are.
        bits: of an integer.
        dtype: that it is multiplied in.
        saved_bytes: of its quantized weight.
        is_lookup: whether its rows are looked up; then no data tell anything about it.
    """

    rows: int
    inputs: int
    blocks: int
    bits: int
    dtype: torch.dtype
    saved_bytes: int
    is_lookup: bool = False

    @classmethod
    def of(cls, module: nn.Module, bits: int, config: QuantConfig) -> "LayerWork":
        """Of a float layer, whose weight may be on meta."""
        form, (rows, inputs) = chosen_form(module), matrix_of(module).shape
        blocks = form.blocks(module)
        size = weight_bytes(module, bits, config)
        dtype = module.get_parameter("weight").dtype
        return cls(rows // blocks, inputs, blocks, bits, dtype, size, form.is_lookup)

    @property
    def elements(self) -> int:
        """Of the weight."""
        return self.rows * self.inputs * self.blocks


@dataclass(frozen=True)
class Batches:
    """Rehearsals of the batches of a run; those of one shape are the same object.

    Attributes:
        fitted: of those that choose integers.
        held_out: of those that only measure.
    """

    fitted: Sequence[Rehearsal] = ()
    held_out: Sequence[Rehearsal] = ()

    @classmethod
    def of(
        cls, calls: Sequence[Call], run: Callable[[Call], Rehearsal | None], *, has_copies: bool
    ) -> "Batches | None":
        """Split the batches as a run does, and rehearse each shape once.

        Args:
            calls: the batches.
            run: rehearses one.
            has_copies: whether copies of them choose integers too (`token_noise`).

        Returns:
            None where a batch cannot be rehearsed.
        """
        known: dict[str, Rehearsal | None] = {}

        def rehearsed(call: Call) -> Rehearsal | None:
            shapes = call.describe()
            if shapes not in known:
                known[shapes] = run(call)
            return known[shapes]

        parts = [[rehearsed(call) for call in part] for part in hold_out(calls)]
        fitted, held_out = ([r for r in part if r is not None] for part in parts)
        if has_copies:
            fitted += fitted[::COPIED]
        return None if None in known.values() else cls(fitted, held_out)

    @property
    def all(self) -> list[Rehearsal]:
        """Both."""
        return [*self.fitted, *self.held_out]

    @property
    def readings(self) -> list[Reading]:
        """Of the batch in which most layers run."""
        return max((batch.readings for batch in self.all), key=len, default=[])

    @property
    def parts(self) -> int:
        """In how many parts the data are summed."""
        return len(parts_of(len(self.fitted)))

    def tokens(self, index: int) -> int:
        """Of all batches that choose, at a reading of this number."""
        return sum(_at(batch, index).tokens for batch in self.fitted)

    def held_tokens(self, index: int) -> int:
        """Of all batches that are held out."""
        return sum(_at(batch, index).tokens for batch in self.held_out)

    def waiting(self, index: int) -> int:
        """Bytes that wait in one graph, of all batches."""
        return sum(_at(batch, index).alive for batch in self.all)


def _at(batch: Rehearsal, index: int) -> Reading:
    return batch.readings[min(index, len(batch.readings) - 1)]


def layers_of(
    gm: GraphModule, decisions: Iterable[Decision], config: QuantConfig
) -> tuple[dict[str, LayerWork], dict[str, nn.Module]]:
    """The layers that decisions quantize, and the modules of those that data tell about.

    A weight that several layers read is quantized once, for the first of them.
    """
    bits = {d.module: d.bits for d in decisions if d.bits is not None}
    found: dict[str, LayerWork] = {}
    modules: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for site in sites(gm):
        if site.name not in bits or site.name in found or form_of(site.module) is None:
            continue
        work = LayerWork.of(site.module, bits[site.name], config)
        memory = memory_of(site.module.get_parameter("weight"))
        if memory not in seen:
            seen.add(memory)
            found[site.name] = work
        if not work.is_lookup:
            modules[site.name] = site.module
    return found, modules


def float_bytes(model: nn.Module, without: Mapping[str, nn.Module]) -> int:
    """Bytes of the parameters and buffers that stay float; those that are tied count once.

    Args:
        model: may be on meta.
        without: layers that will be quantized, whose weights do not count.
    """
    weights = {memory_of(module.get_parameter("weight")) for module in without.values()}
    sizes = {memory_of(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(size for memory, size in sizes.items() if memory not in weights)
