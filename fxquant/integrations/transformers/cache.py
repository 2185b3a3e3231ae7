"""Keys and values of the tokens before, in memory that has room for more.

transformers' `DynamicCache` copies all of them to new memory for each token. This one copies when
its room is full, which then grows by half:

    model.generate(**inputs, past_key_values=RoomyCache(config=model.config))
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fxquant.kernels.eager import is_plain

LEAST_ROOM = 128  # tokens more than there are


class RoomyCache(DynamicCache):
    """A `DynamicCache` whose layers have room for more tokens than they hold.

    It is created and used like its base, and gives the same keys and values, as views of its
    memory. Layers with a sliding window are those of transformers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if vars(self).get("layer_class_to_replicate") is DynamicLayer:
            self.layer_class_to_replicate = _RoomyLayer
        for layer in self.layers:
            if type(layer) is DynamicLayer:
                layer.__class__ = _RoomyLayer


@dataclass
class _Room:
    """Memory of one layer [batch, heads, tokens, width], and its part that is in use.

    Attributes:
        owner: the id of the layer; a copy of it must not write into the same memory.
    """

    owner: int
    keys: Tensor
    values: Tensor
    used_keys: Tensor
    used_values: Tensor

    def fits(self, layer: DynamicLayer, keys: Tensor, values: Tensor) -> bool:
        """Whether more keys and values of a layer can be written behind those that it holds.

        Whoever changes what a layer holds, as `crop` does, makes other tensors of it.
        """
        return (
            self.owner == id(layer)
            and layer.keys is self.used_keys
            and layer.values is self.used_values
            and self.used_keys.shape[2] + keys.shape[2] <= self.keys.shape[2]
            and all(map(_is_alike, (self.keys, self.values), (keys, values)))
            and self.keys.is_inference() <= torch.is_inference_mode_enabled()
        )


class _RoomyLayer(DynamicLayer):
    """A layer of the cache."""

    keys: Tensor
    values: Tensor
    _room: _Room | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep keys and values [batch, heads, tokens, width], and give all that are kept."""
        needs_gradient = torch.is_grad_enabled() and (
            key_states.requires_grad or value_states.requires_grad
        )
        if needs_gradient or not is_plain(key_states) or not is_plain(value_states):
            self._room = None
            all_states: tuple[Tensor, Tensor] = super().update(
                key_states, value_states, *args, **kwargs
            )
            return all_states
        if self._room is None or not self._room.fits(self, key_states, value_states):
            super().update(key_states, value_states, *args, **kwargs)
            self._take_room()
            return self.keys, self.values
        room, count, more = self._room, self.keys.shape[2], key_states.shape[2]
        room.keys.narrow(2, count, more).copy_(key_states)
        room.values.narrow(2, count, more).copy_(value_states)
        self.keys = room.used_keys = room.keys.narrow(2, 0, count + more)
        self.values = room.used_values = room.values.narrow(2, 0, count + more)
        return self.keys, self.values

    def _take_room(self) -> None:
        """Move what is held to memory that has room for more."""
        rooms = []
        for held in (self.keys, self.values):
            batch, heads, count, width = held.shape
            room = held.new_empty(batch, heads, count + max(LEAST_ROOM, count // 2), width)
            room.narrow(2, 0, count).copy_(held)
            rooms.append(room)
        self.keys, self.values = (room.narrow(2, 0, count) for room in rooms)
        self._room = _Room(id(self), rooms[0], rooms[1], self.keys, self.values)


def _is_alike(room: Tensor, new: Tensor) -> bool:
    """Whether they differ in nothing but the number of tokens."""
    return (
        room.dtype == new.dtype
        and room.shape[:2] == new.shape[:2]
        and room.shape[3:] == new.shape[3:]
    )
