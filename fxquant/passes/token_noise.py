"""Copies of the data with tokens drawn at random: layers fitted to one kind of text hold on others.

A layer that is fitted to one book learns what its inputs look like in that book. Copies of the
batches in which part of the tokens come from all of the vocabulary show it more of what the model
may be given, and nobody has to know what that will be. What is measured stays without noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant.errors import OptionError
from fxquant.graph.calls import Call
from fxquant.passes.padding import padding_mask

SMALLEST_VOCABULARY = 256  # that of bytes; smaller ones are kinds of segments, or labels
COPIED = 4  # one batch in so many
ID_DTYPES = (torch.int32, torch.int64)


def noisy_copies(
    calls: Sequence[Call], share: float, run: Callable[[Call], Any], accepts: Callable[[Call], bool]
) -> list[Call]:
    """Copies of every fourth call with tokens drawn at random.

    The first and the last token of each row stay, since models know them as its start and end.

    Args:
        calls: of a model; at least one.
        share: of the tokens that are drawn; with 0 there are no copies.
        run: the model.
        accepts: whether the model takes a call.

    Raises:
        OptionError: no argument is looked up in an embedding as ids of tokens [rows, tokens], or
            the model does not take tokens that are drawn at random.
    """
    if not share:
        return []
    vocabularies = token_arguments(calls[0], run)
    copies = [_noisy(call, vocabularies, share, seed) for seed, call in enumerate(calls[::COPIED])]
    if not vocabularies or not accepts(copies[0]):
        found = "has no argument that it looks up as ids of tokens [rows, tokens]"
        raise OptionError(
            "token_noise",
            found=f"{share} for a model that "
            + ("does not run on tokens drawn at random" if vocabularies else found),
            needed="a model of text",
            remedy="Leave token_noise out, and take calibration data of more kinds.",
        )
    return copies


def check_has_batches(share: float) -> None:
    """Refuse noise where there is no data that it could be added to.

    Raises:
        OptionError: `share` is not 0.
    """
    if share:
        raise OptionError(
            "token_noise",
            found=f"{share} without data",
            needed="batches of ids of tokens, of which copies are made",
            remedy="Pass data, if only some of fxquant.calibration_text(); or leave it out.",
        )


def token_arguments(call: Call, run: Callable[[Call], Any]) -> dict[int, int]:
    """Which arguments are ids of tokens, by their place among the leaves: the vocabulary's size.

    They are what the model looks up in an embedding of at least `SMALLEST_VOCABULARY` rows, but
    not positions, which count up.

    Args:
        call: of the model.
        run: the model.
    """
    with _Lookups() as lookups:
        run(call)
    found = {}
    for place, leaf in enumerate(pytree.tree_leaves((call.args, call.kwargs))):
        if not isinstance(leaf, Tensor) or leaf.dtype not in ID_DTYPES or leaf.ndim != 2:
            continue
        sizes = [size for ids, size in lookups.seen if torch.equal(ids, leaf.long().flatten())]
        counts_up = bool((leaf.diff(dim=1) == 1).all())
        if sizes and min(sizes) >= SMALLEST_VOCABULARY and not counts_up:
            found[place] = min(sizes)
    return found


class _Lookups(TorchDispatchMode):
    """Notes what is looked up in embeddings.

    Attributes:
        seen: ids, int64 [count], and of how many rows they choose.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.embedding.default:
            weight, ids = args[:2]
            self.seen.append((ids.long().flatten().clone(), len(weight)))
        return func(*args, **(kwargs or {}))


def _noisy(call: Call, vocabularies: dict[int, int], share: float, seed: int) -> Call:
    """A copy of a call; of its tokens about `share` are drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    for place, size in vocabularies.items():
        ids = leaves[place]
        is_drawn = torch.rand(ids.shape, generator=generator) < share
        drawn = torch.randint(size, ids.shape, generator=generator)
        is_inner = _inner(call, ids)
        leaves[place] = torch.where(is_drawn.to(ids.device) & is_inner, drawn.to(ids), ids)
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return replace(call, args=args, kwargs=kwargs)


def _inner(call: Call, ids: Tensor) -> Tensor:
    """Which tokens are neither padding nor the first or the last one of their row."""
    mask = padding_mask(call)
    real = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask.to(ids)
    from_start, from_end = real.cumsum(1), real.flip(1).cumsum(1).flip(1)
    return (real * from_start > 1) & (real * from_end > 1)
