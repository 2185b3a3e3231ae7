"""A model calibrated block by block: never more of it in memory than one block.

For each block in turn: its weights are read, its graph is traced, its layers are quantized on what
the block is called with in the float model and in the one whose blocks before it are quantized (as
`quantize` does with a whole model), and written. Then the block runs twice on all batches, with its
float weights and with those read back from the new file; what it returns is what the next block is
called with. A block that an interrupted run has finished only runs.

Where several processes share the work, a block is in the memory of each; its layers are fitted
together, and the first process writes it.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing

from torch import Tensor, nn

from fxquant.config.quant_config import QuantConfig
from fxquant.distributed.processes import ALONE, Processes
from fxquant.exporters.block_calls import BlockCalls
from fxquant.exporters.block_list import BlockList, find_blocks
from fxquant.exporters.block_record import first_call
from fxquant.exporters.folder_writer import FolderWriter
from fxquant.exporters.model_weights import ModelWeights
from fxquant.exporters.unfinished import UnfinishedFolder
from fxquant.graph.calls import Call
from fxquant.graph.layers import name_below, sites
from fxquant.graph.structures import main_output
from fxquant.measure.heldout import hold_out
from fxquant.modules.grouped_linear import GroupedLinear
from fxquant.modules.layer import QuantizedLayer
from fxquant.numerics.metrics import SqnrMeter
from fxquant.passes.calibration_data import check_batches
from fxquant.passes.decide import Decision
from fxquant.passes.padding import padding_mask, without_padding
from fxquant.passes.rounded_layers import RoundedLayers
from fxquant.passes.token_noise import noisy_copies
from fxquant.report.progress import steps
from fxquant.stages import WAITING_SHARE, run_part
from fxquant.tracing.opaque import graph_around
from fxquant.tracing.trace import trace


class Blockwise:
    """Quantizes the blocks of a model with data.

    Args:
        weights: of the model.
        decisions: on the model's layers.
        config: what is wanted; its method scales no channels.
        calls: of the model.
        most_bytes: of values that wait in memory; None: no bound.
        processes: that share the work.

    Attributes:
        blocks: of the model.
        heldout_samples: how many rows choose no integer.
        notes: what there is to say of layers outside of the blocks, by name.

    Raises:
        CalibrationError: the data has no rows, or NaN, or the model raises on it.
        OptionError: the layers are not in one list of blocks that run one after the other, or the
            folder lacks a tensor.
    """

    def __init__(
        self,
        weights: ModelWeights,
        decisions: list[Decision],
        config: QuantConfig,
        calls: Sequence[Call],
        most_bytes: int | None,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        check_batches(calls)
        weights.check()
        chosen = [d.module for d in decisions if d.bits is not None]
        self.blocks: BlockList = find_blocks(weights.model, chosen)
        outside = [name for name in chosen if self.blocks.owner(name) is None]
        self.notes = dict.fromkeys(outside, "outside of the blocks: rounded without data")
        self.weights, self.decisions = weights, decisions
        self.config = config.changed(token_noise=0.0)  # of blocks, which read no tokens
        fitted, held_out = hold_out(calls)
        copies = self._noisy_copies(fitted, config.token_noise)
        self._calls, self._fitted = [*fitted, *copies, *held_out], len(fitted) + len(copies)
        self._measured = range(self._fitted, len(self._calls)) if held_out else range(len(fitted))
        self.heldout_samples = sum(call.row_count for call in held_out)
        # Half for what waits between blocks, half for what waits inside of one.
        self._most_bytes = None if most_bytes is None else int(most_bytes * WAITING_SHARE) // 2
        self._waiting = BlockCalls(weights, self.blocks, self._calls, self._most_bytes)

    def _noisy_copies(self, fitted: list[Call], share: float) -> list[Call]:
        """What `token_noise` adds: ids are looked up before the first block."""

        def run(call: Call) -> Call:
            with self.weights.filled_when_called(without=self.blocks.blocks):
                return first_call(self.weights.model, self.blocks, call, 0)

        return noisy_copies(fitted, share, run, lambda call: True)

    def shards(self, names: Iterable[str]) -> list[list[str]]:
        """Which of the tensors called `names` make up the shard of each block."""
        shards: list[list[str]] = [[] for _ in self.blocks.blocks]
        for name in names:
            owner = self.blocks.owner(self.weights.parameter_of.get(name, name))
            if owner is not None:
                shards[owner].append(name)
        return shards

    def run(self, writer: FolderWriter, folder: UnfinishedFolder) -> float | None:
        """Make the shards of all blocks, which are the folder's first.

        Args:
            writer: of shards.
            folder: where to.

        Returns:
            Output SQNR in dB, on the rows that were held out, or on all where none were.

        Raises:
            CalibrationError: a block does not take its calls, or a value is not finite.
            SaveError: a shard cannot be written, or does not read back.
            WeightError: a weight cannot be quantized; the layer is named.
        """
        shards, waiting = self.shards(self.weights.base.files), self._waiting
        with closing(waiting):
            for number, block in enumerate(steps(self.blocks.blocks, "quantizing blocks")):
                is_there = folder.notes(number) is not None
                if not self.processes.broadcast(is_there, 0):
                    layers, reasons = self._quantize(number, waiting)
                    if self.processes.rank == 0:
                        writer.shard(folder, number, shards[number], layers, reasons)
                    self.processes.meet()
                with self.weights.filled(block):
                    waiting.advance("clean", number)
                with self.weights.filled(block, writer.reader(folder)):
                    waiting.advance("noisy", number)
            return self._output_sqnr(waiting, writer.reader(folder))

    def _quantize(
        self, number: int, waiting: BlockCalls
    ) -> tuple[dict[str, QuantizedLayer], dict[str, str]]:
        """The quantized layers of a block by name, and what there is to say of some."""
        own = [d for d in self.decisions if self.blocks.owner(d.module) == number]
        chosen = {d.module: d.bits for d in own if d.bits is not None}
        if not chosen:
            return {}, {}
        every, at = range(len(self._calls)), self._fitted
        clean = waiting.calls("clean", number, every)
        block = self.blocks.blocks[number]
        with self.weights.filled(block):
            batch, are_alike = waiting.widest(number)
            example = clean[batch]
            # The block's own code takes calls of several forms, and a graph of it takes one.
            gm = trace(block, example) if are_alike else graph_around(block, example)
            name_below(gm, self.blocks.name(number))
            reached = {site.name for site in sites(gm)}
            qmodel, said = run_part(
                gm,
                [d for d in own if d.module in reached],
                clean[:at],
                clean[at:],
                self.config,
                noisy=waiting.calls("noisy", number, every),
                most_bytes=self._most_bytes,
                processes=self.processes,
            )
            made = {s.name: s.module for s in sites(qmodel) if s.name in chosen}
            before = {d.module: d.reason for d in own}
            added = {d.module: d.reason.removeprefix(before[d.module]) for d in said}
            notes = {name: text.removeprefix("; ") for name, text in added.items() if text}
            rounded = RoundedLayers(self.config)
            for name in chosen.keys() - made.keys():
                layer = self._float_layer(name)
                made[name] = rounded.quantize(name, layer, chosen[name])
                notes[name] = "its block does not call it: rounded to nearest without data"
        layers = {name: m for name, m in made.items() if isinstance(m, QuantizedLayer)}
        assert layers.keys() == chosen.keys()
        return layers, notes

    def _float_layer(self, name: str) -> nn.Module:
        """A layer of the model, or one on the parameter of that name, which experts have."""
        owner, _, last = name.rpartition(".")
        found = getattr(self.weights.model.get_submodule(owner), last)
        return found if isinstance(found, nn.Module) else GroupedLinear.on(found)

    def _output_sqnr(self, waiting: BlockCalls, read: Callable[[str], Tensor]) -> float | None:
        """The output's error, a row at a time: outputs may be large.

        Args:
            waiting: the blocks have run.
            read: gives the tensors of the quantized model.
        """
        meter = SqnrMeter()
        for batch in self._measured:
            call, clean = self._calls[batch], waiting.handed_on("clean", batch)
            noisy = waiting.handed_on("noisy", batch)
            for rows in _parts(call, len(clean)):
                part = call.rows(rows.start, rows.stop)
                expected = main_output(waiting.finish(part, clean[rows], self.weights.read))
                found = main_output(waiting.finish(part, noisy[rows], read))
                meter.add(*without_padding(padding_mask(part), expected, found))
        return meter.db_or_none


def _parts(call: Call, rows: int) -> list[slice]:
    """Each row on its own, where the call can be cut into the rows that its blocks see."""
    can_be_cut = call.row_count == rows and call.rows(0, 1).row_count == 1
    return [slice(i, i + 1) for i in range(rows)] if can_be_cut else [slice(0, rows)]
