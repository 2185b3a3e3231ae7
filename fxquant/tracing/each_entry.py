"""Loops over the true entries of a mask, which an export takes over all entries.

`for expert in hit.nonzero():` runs as often as the values say, so it cannot be exported. Which
experts there are is known, though, and one that no token has chosen mostly has nothing to do: its
rows are empty. Here the loop runs for every entry, and the mask is noted in the graph. Whether an
entry that is not true changes nothing is seen when the graph is compared with the model: a graph is
taken only if each noted mask had an entry that was not true in some call on which both agreed.

before: for e in (counts > 0).nonzero(): y.index_add_(0, rows_of(e), expert[e](x[rows_of(e)]))
after:  note(counts > 0); the round for e = 0; the round for e = 1; ...
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.overrides import TorchFunctionMode

_library = torch.library.Library("fxquant_tracing", "FRAGMENT")
_library.define("note(Tensor mask, int number) -> ()")
NOTE = torch.ops.fxquant_tracing.note.default
torch.fx.node.has_side_effect(NOTE)

_NONZERO = (torch.nonzero, Tensor.nonzero, torch.where, torch.argwhere, Tensor.argwhere)
_ITERATE = (torch.unbind, Tensor.unbind, Tensor.__iter__)
_VIEWS = (Tensor.__getitem__, Tensor.squeeze, Tensor.reshape, Tensor.view, Tensor.flatten)
_VALUES = (Tensor.item, Tensor.__int__, Tensor.__index__)
_numbers_of_masks = itertools.count()
_listening: list[set[int]] = []


def _note(mask: Tensor, number: int) -> None:
    """What an export sees of the op: it computes nothing."""


def _note_values(mask: Tensor, number: int) -> None:
    if not bool(mask.all()):
        for were_false in _listening:
            were_false.add(number)


torch.library.register_fake("fxquant_tracing::note", _note)
_library.impl("note", _note_values, "CompositeExplicitAutograd")


@contextmanager
def listening() -> Iterator[set[int]]:
    """The numbers of the masks that had an entry which is not true, in what runs inside."""
    were_false: set[int] = set()
    _listening.append(were_false)
    try:
        yield were_false
    finally:
        _listening.remove(were_false)


def drop_notes(graph: Graph) -> set[int]:
    """Take the notes out of a graph; the numbers of their masks."""
    found = [node for node in graph.nodes if node.target is NOTE]
    for node in found:
        graph.erase_node(node)
    return {node.args[1] for node in found}


class EachEntry(TorchFunctionMode):
    """Exports inside go through all entries of a one-dimensional mask instead of the true ones."""

    def __init__(self) -> None:
        super().__init__()
        # By identity, with the tensors themselves, so that no other gets the identity of one.
        self._places: dict[int, tuple[Tensor, Tensor]] = {}  # places of true entries, and the mask
        self._known: dict[int, tuple[Tensor, int]] = {}  # tensors of one number that is known

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        first: Any = args[0] if args else None
        if id(first) in self._places and args[1:] in ((), (0,)) and not kwargs:
            if func in _ITERATE:
                entries = self._entries(first)
                return iter(entries) if func is Tensor.__iter__ else entries
            if func is Tensor.tolist and first.ndim == 1:
                return [self._known[id(entry)][1] for entry in self._entries(first)]
        if id(first) in self._known:
            number = self._known[id(first)][1]
            if func in _VALUES:
                return number
            if func is Tensor.__format__ and first.ndim == 0:  # the name of a child
                return format(number, *args[1:])
        result = func(*args, **(kwargs or {}))
        if func in _VIEWS and id(first) in self._known and result.numel() == 1:
            self._known[id(result)] = (result, self._known[id(first)][1])
        if func in _NONZERO and len(args) == 1 and isinstance(first, Tensor):
            self._remember(first, result)
        return result

    def _remember(self, mask: Tensor, result: Any) -> None:
        if mask.ndim == 1 and type(mask.shape[0]) is int:
            places = result[0] if isinstance(result, tuple | list) else result
            self._places[id(places)] = (places, mask)

    def _entries(self, places: Tensor) -> list[Tensor]:
        """The place of each entry, in the form that the rows of `places` have."""
        mask = self._places[id(places)][1]
        NOTE(mask, next(_numbers_of_masks))
        entries = []
        for number in range(mask.shape[0]):
            value = [number] if places.ndim == 2 else number
            entries.append(torch.tensor(value, device=mask.device))
            self._known[id(entries[-1])] = (entries[-1], number)
        return entries
