"""What the blocks of a model are called with, while it waits for its block.

Of each batch there are the arguments that stay the same (masks, positions) and the output of the
block before, once of the float model and once of the one whose blocks are quantized. They wait in
`HeldValues`: in memory up to a bound, else in a file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxquant.errors import CalibrationError
from fxquant.exporters.block_list import BlockList
from fxquant.exporters.block_record import (
    finish,
    learn_handover,
    leaves_of,
    main_tensor,
    record,
    repeated,
)
from fxquant.exporters.model_weights import ModelWeights
from fxquant.graph.calls import Call
from fxquant.passes.calibrate import run_call
from fxquant.passes.held_values import HeldValues
from fxquant.passes.padding import fitting_mask, padding_mask

Stream = Literal["clean", "noisy"]  # of the float model, of the one with quantized blocks
STREAMS: tuple[Stream, ...] = ("clean", "noisy")


@dataclass(frozen=True)
class _Held:
    """A tensor among the arguments, by its number among those of the batch."""

    number: int


@dataclass(frozen=True)
class _Pattern:
    """The arguments of a block: plain values, and which tensor is where."""

    leaves: list[Any]
    spec: pytree.TreeSpec


class BlockCalls:
    """The calls of all blocks in all batches.

    Args:
        weights: of the model.
        blocks: of the model.
        calls: of the model; at least one.
        most_bytes: of what waits in memory; None: no bound.

    Raises:
        CalibrationError: the model raises on a call.
        OptionError: its blocks do not run one after the other, or the folder lacks a tensor.
    """

    def __init__(
        self,
        weights: ModelWeights,
        blocks: BlockList,
        calls: Sequence[Call],
        most_bytes: int | None,
    ) -> None:
        self.weights, self.blocks, self.model_calls = weights, blocks, calls
        self._held = HeldValues(most_bytes)
        self._patterns: list[list[_Pattern]] = []  # by batch and block
        with weights.filled_when_called(without=blocks.blocks):
            self._handover = learn_handover(weights, blocks, calls[0])
            for index, call in enumerate(calls):
                self._add(index, record(weights.model, blocks, call, index, self._handover))

    def _add(self, batch: int, seen: Sequence[Call]) -> None:
        """Keep what the blocks are called with in a batch."""
        hidden = leaves_of(seen[0])[self._handover.leaf]
        numbers: dict[int, int] = {}
        tensors: dict[Any, Tensor] = {}
        patterns = []
        for call in seen:
            leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
            leaves[self._handover.leaf] = None
            for place, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    number = numbers.setdefault(id(leaf), len(numbers))
                    tensors[number], leaves[place] = leaf, _Held(number)
            patterns.append(_Pattern(leaves, spec))
        self._patterns.append(patterns)
        self._held.put(self._key(batch, None), [tensors])
        for stream in STREAMS:
            self._held.put(self._key(batch, stream), [{0: hidden.detach()}])

    def call(self, stream: Stream, block: int, batch: int) -> Call:
        """The call of a block; what is the same for all rows of the batch is there once."""
        pattern = self._patterns[batch][block]
        tensors = self._look(batch, None)
        leaves = [tensors[v.number] if isinstance(v, _Held) else v for v in pattern.leaves]
        leaves[self._handover.leaf] = self.handed_on(stream, batch)
        args, kwargs = pytree.tree_unflatten(leaves, pattern.spec)
        return Call(args, kwargs, padding_mask(self.model_calls[batch]))

    def calls(self, stream: Stream, block: int, batches: range) -> Sequence[Call]:
        """The calls of a block, made when they are asked for.

        What is the same for all rows of a batch is repeated for each, where the block takes that: a
        graph of it is for batches of any size then.
        """
        return _Calls(self, stream, block, batches)

    def widest(self, block: int) -> tuple[int, bool]:
        """The first batch in which a block is called with the most tensors, and whether all do.

        A mask may be absent where no token is padding: a graph is for calls of one form.
        """
        forms = [
            tuple(isinstance(leaf, _Held) or leaf for leaf in patterns[block].leaves)
            for patterns in self._patterns
        ]
        counts = [sum(value is True for value in form) for form in forms]
        return counts.index(max(counts)), len(set(forms)) == 1

    def widened(self, call: Call) -> Call:
        """A call of a block with what is the same for all rows repeated for each."""
        rows = len(leaves_of(call)[self._handover.leaf])
        return repeated(call, rows) if self._handover.repeats else call

    def handed_on(self, stream: Stream, batch: int) -> Tensor:
        """What the block that ran last returned; before the first, what that is given."""
        return self._look(batch, stream)[0]

    def advance(self, stream: Stream, block: int) -> None:
        """Run a block, which has its values, on all batches: the next one gets its outputs.

        Raises:
            CalibrationError: it raises, or its outputs are not finite.
        """
        for batch in range(len(self.model_calls)):
            call = self.call(stream, block, batch)
            output = main_tensor(run_call(self.blocks.blocks[block], call, batch))
            mask = fitting_mask(call.padding, output)
            if not torch.isfinite(output if mask is None else output[mask]).all():
                raise CalibrationError(
                    f"calibration batch {batch}, output of {self.blocks.name(block)}",
                    found="NaN or Inf",
                    needed="finite values",
                    remedy="Check the checkpoint, and that the data is what the model is made for.",
                )
            self._held.take(self._key(batch, stream))
            self._held.put(self._key(batch, stream), [{0: output}])

    def finish(self, call: Call, hidden: Tensor, read: Callable[[str], Tensor]) -> Any:
        """What the model returns for a call of it, if its last block hands `hidden` on.

        Args:
            call: of the model.
            hidden: the value.
            read: gives the tensors of modules outside of the blocks, by name.
        """
        with self.weights.filled_when_called(self.blocks.blocks, read):
            return finish(self.weights.model, self.blocks, call, self._handover, hidden)

    def close(self) -> None:
        """Give the file back."""
        self._held.close()

    def _look(self, batch: int, stream: Stream | None) -> dict[Any, Tensor]:
        values = self._held.look(self._key(batch, stream))
        assert values is not None  # it was put
        return values[0]

    def _key(self, batch: int, stream: Stream | None) -> int:
        """Under which number the values of a batch are held; without a stream, the arguments."""
        return batch * (len(STREAMS) + 1) + (0 if stream is None else 1 + STREAMS.index(stream))


class _Calls(Sequence[Call]):
    """Some calls of a block; none is kept."""

    def __init__(self, owner: BlockCalls, stream: Stream, block: int, batches: range) -> None:
        self.owner, self.stream, self.block, self.batches = owner, stream, block, batches

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> Call: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Call]: ...

    def __getitem__(self, index: int | slice) -> Call | Sequence[Call]:
        if isinstance(index, slice):
            return _Calls(self.owner, self.stream, self.block, self.batches[index])
        call = self.owner.call(self.stream, self.block, self.batches[index])
        return self.owner.widened(call)
