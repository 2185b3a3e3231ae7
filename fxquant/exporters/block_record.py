"""Running a model's own code around its blocks, without a block: what it calls them with.

In the place of each block a stand-in notes the arguments and answers with a made-up value. That
shows how blocks hand their outputs on: one argument of a block is the output of the block before
it; the others (masks, positions) must not depend on outputs of blocks, and two runs with different
made-up values must agree about them. A model that works in another way is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.errors import OptionError
from fxquant.exporters.block_list import WHOLE_MODEL_REMEDY, BlockList
from fxquant.exporters.model_weights import ModelWeights
from fxquant.graph.calls import Call
from fxquant.passes.calibrate import run_call

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class _EnoughError(BaseException):
    """All that was wanted is known: the model need not go on."""


@dataclass(frozen=True)
class Handover:
    """How blocks hand their outputs on.

    Attributes:
        leaf: which leaf of a block's arguments is the output of the block before it.
        example: what a block returns: a tensor, or a tuple or list that begins with it.
        repeats: whether arguments that are the same for all rows of a batch may be repeated for
            each row.
    """

    leaf: int
    example: Any
    repeats: bool

    def returned(self, hidden: Tensor) -> Any:
        """What a block returns that hands `hidden` on."""
        return _returned(self.example, hidden)


def learn_handover(weights: ModelWeights, blocks: BlockList, call: Call) -> Handover:
    """How the blocks hand their outputs on; the first block runs for it, and no other.

    Args:
        weights: of the model; the modules outside of the blocks have their values.
        blocks: of the model.
        call: of the model.

    Raises:
        CalibrationError: the model raises.
        OptionError: the blocks do not run one after the other, each on the output of the one before
            it; or the folder lacks a tensor.
    """
    first = first_call(weights.model, blocks, call, 0)
    block, behind = blocks.blocks[0], range(1, len(blocks))
    with weights.filled(block):
        example = run_call(block, first, 0)
        main = main_tensor(example)
        wide = main_tensor(run_call(block, repeated(first, len(main)), 0))
    answers = [[_filled(example, value) for _ in behind] for value in (0, 1)]
    zeros, ones = (_run(weights.model, blocks, call, 0, given) for given in answers)
    leaf = _leaf_handed_on(answers[0], zeros, main)
    for one, other in zip(zeros, ones, strict=True):
        _check_independent(one, other, leaf)
    return Handover(leaf, example, torch.equal(main, wide))


def first_call(model: nn.Module, blocks: BlockList, call: Call, index: int) -> Call:
    """What the first block is called with; no block runs.

    Args:
        model: with values wherever its code before the blocks needs them.
        blocks: of the model.
        call: of the model.
        index: its number, for errors.

    Raises:
        CalibrationError: the model raises.
        OptionError: another block runs first.
    """
    return _run(model, blocks, call, index, [])[0]


def record(
    model: nn.Module, blocks: BlockList, call: Call, index: int, handover: Handover
) -> list[Call]:
    """What each block is called with; in the place of a block's output there is a made-up value.

    Args:
        model: with values wherever its code outside of the blocks needs them.
        blocks: of the model.
        call: of the model.
        index: its number, for errors.
        handover: how blocks hand their outputs on.

    Raises:
        CalibrationError: the model raises.
        OptionError: the blocks do not run one after the other.
    """
    first = first_call(model, blocks, call, index)
    answer = handover.returned(leaves_of(first)[handover.leaf])
    return _run(model, blocks, call, index, [answer] * (len(blocks) - 1))


def finish(
    model: nn.Module, blocks: BlockList, call: Call, handover: Handover, hidden: Tensor
) -> Any:
    """What the model returns where its last block hands `hidden` on."""
    answer = handover.returned(hidden)
    with _stand_ins(blocks, lambda number, given: answer):
        return run_call(model, call, 0)


def leaves_of(call: Call) -> list[Any]:
    """The arguments of a call, out of their containers."""
    return pytree.tree_leaves((call.args, call.kwargs))


def main_tensor(output: Any) -> Tensor:
    """What a block hands on: the tensor that it returns, or the first of several values.

    Raises:
        OptionError: it returns something else.
    """
    main = output[0] if isinstance(output, tuple | list) and output else output
    if isinstance(main, Tensor):
        return main
    raise _refusal(f"a block that returns a {type(main).__name__}")


def repeated(call: Call, rows: int) -> Call:
    """The call with tensors of one row repeated for each of `rows`."""
    return call.map(lambda t: t.expand(rows, *t.shape[1:]) if t.ndim > 1 and len(t) == 1 else t)


def _run(
    model: nn.Module, blocks: BlockList, call: Call, index: int, answers: Sequence[Any]
) -> list[Call]:
    """The calls of the blocks up to the first one for which there is no answer."""
    seen: list[Call] = []
    order: list[int] = []

    def stand_in(number: int, given: Call) -> Any:
        order.append(number)
        seen.append(given)
        if number != len(seen) - 1 or number == len(answers):
            raise _EnoughError
        return answers[number]

    with _stand_ins(blocks, stand_in), suppress(_EnoughError):
        run_call(model, call, index)
    if order != list(range(len(answers) + 1)):
        raise _refusal(f"blocks that run in the order {order[:8]}")
    return seen


@contextmanager
def _stand_ins(blocks: BlockList, stand_in: Callable[[int, Call], Any]) -> Iterator[None]:
    """Call `stand_in` with the number of a block and its arguments where the block would run."""

    def forward_of(number: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: stand_in(number, Call(args, kwargs))

    try:
        for number, block in enumerate(blocks.blocks):
            vars(block)["forward"] = forward_of(number)
        yield
    finally:
        for block in blocks.blocks:
            vars(block).pop("forward", None)


def _leaf_handed_on(answers: Sequence[Any], seen: Sequence[Call], main: Tensor) -> int:
    """Which leaf of every block's arguments is what the block before it returned.

    Args:
        answers: of all blocks but the last.
        seen: the arguments of all blocks.
        main: what the first block returned, which is as what it was given.
    """
    for place, leaf in enumerate(leaves_of(seen[0])):
        is_like = isinstance(leaf, Tensor) and leaf.shape == main.shape and leaf.dtype == main.dtype
        later = [leaves_of(call)[place : place + 1] for call in seen[1:]]
        handed = [main_tensor(answer) for answer in answers]
        if is_like and all(a[:1] and a[0] is b for a, b in zip(later, handed, strict=True)):
            return place
    raise _refusal("blocks that are not called with what the block before them returned")


def _check_independent(one: Call, other: Call, leaf: int) -> None:
    """Refuse arguments that depend on outputs of blocks, or that have a state."""
    pairs = zip(leaves_of(one), leaves_of(other), strict=True)
    for place, (a, b) in enumerate(pairs):
        if place == leaf:
            continue
        if not isinstance(a, (Tensor, *PLAIN)):
            raise _refusal(f"blocks that are called with a {type(a).__name__}")
        is_same = torch.equal(a, b) if isinstance(a, Tensor) else a == b
        if not is_same:
            raise _refusal("blocks that are called with several values of the blocks before them")


def _filled(example: Any, value: int) -> Any:
    """An output like `example`, whose tensors hold `value` everywhere."""
    return pytree.tree_map(
        lambda leaf: torch.full_like(leaf, value) if isinstance(leaf, Tensor) else leaf, example
    )


def _returned(example: Any, main: Tensor) -> Any:
    """An output like `example` that hands `main` on."""
    return main if isinstance(example, Tensor) else type(example)([main, *example[1:]])


def _refusal(found: str) -> OptionError:
    return OptionError(
        "quantize_checkpoint with data",
        found=found,
        needed="blocks that run once and in order, each on the output of the one before it and on "
        "values that do not depend on blocks",
        remedy=WHOLE_MODEL_REMEDY,
    )
