"""Keys and values of the tokens before, in memory that has room for more.

transformers' `DynamicCache` copies all of them to new memory for each token. This one copies when
its room is full, which then grows by half:

    model.generate(**inputs, past_key_values=RoomyCache(config=model.config))
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fxquant.kernels.eager import is_plain

LEAST_ROOM = 128  # tokens more than there are


class RoomyCache(DynamicCache):
    """A `DynamicCache` whose layers have room for more tokens than they hold.

    It is created and used like its base: it gives the same keys and values, as views of its memory.
    Layers with a sliding window are those of transformers. What an `update` returned is changed by
    a later one that follows a `crop`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if vars(self).get("layer_class_to_replicate") is DynamicLayer:
            self.layer_class_to_replicate = _RoomyLayer
        for layer in self.layers:
            if type(layer) is DynamicLayer:
                layer.__class__ = _RoomyLayer


class _RoomyLayer(DynamicLayer):
    """A layer of the cache; whoever changes `keys` or `values` makes it take new room."""

    keys: Tensor
    values: Tensor
    _rooms: tuple[Tensor, Tensor] | None = None
    _owner = 0  # a copy of the layer must not write into the room of the first

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep keys and values [batch, heads, tokens, width], and give all that are kept."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (key_states, value_states)
        held = (self.keys, self.values)
        needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (*held, *new))
        if needs_gradient or not all(map(is_plain, (*held, *new))):
            all_states: tuple[Tensor, Tensor] = super().update(*new, *args, **kwargs)
            return all_states
        rooms = self._rooms if self._owner == id(self) else None
        rooms = rooms or held
        kept, rooms_now = zip(*map(_appended, held, new, rooms), strict=True)
        (self.keys, self.values), self._rooms, self._owner = kept, rooms_now, id(self)
        return self.keys, self.values


def _appended(held: Tensor, new: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """What is held with what is new behind it, and the memory around it.

    Args:
        held: [batch, heads, tokens, width], or empty.
        new: [batch, heads, more tokens, width].
        room: the memory that has `held` at its beginning, or another.
    """
    count = held.shape[-2] if held.numel() else 0
    total = count + new.shape[-2]
    fits = (
        room.ndim == new.ndim
        and total <= room.shape[-2]
        and room.data_ptr() == held.data_ptr()
        and room.stride() == held.stride()
        and room.dtype == new.dtype
        and room.shape[:-2] == new.shape[:-2] == held.shape[:-2]
        and room.shape[-1] == new.shape[-1]
        and room.is_inference() <= torch.is_inference_mode_enabled()
    )
    if not fits:
        size = total + max(LEAST_ROOM, total // 2)
        dtype = torch.promote_types(held.dtype, new.dtype) if count else new.dtype
        room = new.new_empty(*new.shape[:-2], size, new.shape[-1], dtype=dtype)
        if count:
            room[..., :count, :] = held
    room[..., count:total, :] = new
    return room[..., :total, :], room
