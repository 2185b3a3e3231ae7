"""Other values of an example call: what else a model is given from day to day.

A branch on values that none of these takes in another way is one that inputs hardly ever take in
another way: each row alone; masks with padding on the right, on the left, in between and without
any, masks with twos for tokens of another kind; other tokens, one token only, all tokens in turn,
tokens that the model asks for; numbers that are zero, of one sign, very large.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fxquant.graph.calls import Call

_LARGE = 1e4
_SEED = 20_001
_MOST_COMPARED = 8
_MOST_ROWS = 8

_Change = Callable[[Tensor], Tensor]


def other_values(call: Call, compared: Sequence[int] = ()) -> Iterator[tuple[str, Call, bool]]:
    """Calls with other values, or with a single row.

    Args:
        call: gives sizes and kinds of values.
        compared: numbers that a token may be, and next to which it may be.

    Yields:
        What is special about a call, the call, and whether its values are as various as those of
        any other: for zeros alone, two different computations may give the same.
    """
    for row in range(min(call.row_count, _MOST_ROWS) if call.row_count > 1 else 0):
        yield f"row {row} alone", call.rows(row, row + 1), True
    numbers = sorted({n + gap for n in compared[:_MOST_COMPARED] for gap in (-1, 0, 1)})
    whole = dict(_WHOLE)
    for number in numbers:
        whole[f"the token {number} only"] = _all_of(number)
        whole[f"the token {number} in the middle"] = _with_one(number)
    for kind, changes in ((_is_mask, _MASKS), (_is_whole, whole), (_is_float, _FLOATS)):
        if any(map(kind, call.tensors())):
            for label, change in changes.items():
                is_various = label not in _PLAIN and not label.endswith("only")
                yield label, call.map(_where(kind, change)), is_various


def _where(kind: Callable[[Tensor], bool], change: _Change) -> _Change:
    return lambda tensor: change(tensor) if kind(tensor) else tensor


def _is_mask(tensor: Tensor) -> bool:
    """Whether it holds nothing but truths, or zeros and ones."""
    if tensor.dtype == torch.bool:
        return True
    is_number = not tensor.is_complex() and tensor.ndim > 0 and tensor.numel() > 0
    return is_number and bool(((tensor == 0) | (tensor == 1)).all())


def _is_whole(tensor: Tensor) -> bool:
    is_number = not (tensor.is_floating_point() or tensor.is_complex())
    return is_number and tensor.numel() > 0 and not _is_mask(tensor)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not _is_mask(tensor)


def _with_zeros(where: _Change) -> _Change:
    """Ones, but zeros at the positions along the last dimension at which `where` is true."""

    def change(mask: Tensor) -> Tensor:
        size = mask.shape[-1] if mask.ndim else 1
        filled = torch.ones_like(mask)
        filled[..., where(torch.arange(size) / size)] = 0
        return filled

    return change


def _all_of(number: int) -> _Change:
    return lambda tokens: torch.full_like(tokens, number)


def _with_one(number: int) -> _Change:
    def change(tokens: Tensor) -> Tensor:
        filled = tokens.clone(memory_format=torch.contiguous_format)
        filled.view(-1)[filled.numel() // 2] = number
        return filled

    return change


def _drawn(tokens: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    least, most = int(tokens.min()), int(tokens.max())
    drawn = torch.randint(least, most + 1, tuple(tokens.shape), generator=generator)
    return drawn.to(tokens)


def _in_turn(tokens: Tensor) -> Tensor:
    count = max(int(tokens.max()) + 1, 1)
    return (torch.arange(tokens.numel()) % count).view(tokens.shape).to(tokens)


def _with_twos(count: Callable[[Tensor], Tensor]) -> _Change:
    """Ones, and twos before the place `count` of a row's number; a mask of truths has no twos."""

    def change(mask: Tensor) -> Tensor:
        filled = torch.ones_like(mask)
        if mask.dtype != torch.bool and mask.ndim:
            ends = count(torch.arange(mask.shape[0]) if mask.ndim > 1 else torch.zeros(1))
            ends = ends.view(-1, *[1] * (mask.ndim - 1)) if mask.ndim > 1 else ends
            filled[(torch.arange(mask.shape[-1]) < ends).expand(mask.shape)] = 2
        return filled

    return change


_MASKS: dict[str, _Change] = {
    "a mask without padding": torch.ones_like,
    "padding on the right": _with_zeros(lambda at: at >= 0.5),
    "padding on the left": _with_zeros(lambda at: at < 0.5),
    "a mask with gaps": _with_zeros(lambda at: (at * 8).long() % 2 == 1),
    "a mask with twos": _with_twos(lambda row: 2 * row + 2),
    "a mask with a two in front": _with_twos(torch.ones_like),
}
_WHOLE: dict[str, _Change] = {
    "other tokens": _drawn,
    "all tokens in turn": _in_turn,
    "all tokens in turn, backwards": lambda tokens: _in_turn(tokens).flatten().flip(0)
    .view(tokens.shape),
    "the token 0 only": torch.zeros_like,
    "the largest token only": lambda tokens: torch.full_like(tokens, int(tokens.max())),
}  # fmt: skip
_FLOATS: dict[str, _Change] = {
    "zeros": torch.zeros_like,
    "zeros in every other place": lambda x: x * (torch.arange(x.numel()) % 2).view(x.shape).to(x),
    "positive numbers": torch.abs,
    "negative numbers": lambda x: -x.abs(),
    "large numbers": lambda x: x.abs() * _LARGE,
    "large negative numbers": lambda x: -x.abs() * _LARGE,
}
_PLAIN = ("zeros", "large numbers", "large negative numbers")
