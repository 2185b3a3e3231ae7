"""A quantized layer as it was found in the files of another format."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class StoredLayer:
    """A weight x ≈ scale · (q − zero_point), taken out of packed words.

    Attributes:
        q: uint8 [out, in].
        scales: float32 [out, groups].
        zero_points: float32 [out, groups].
        group_size: columns a group.
        bits: of an integer.
    """

    q: Tensor
    scales: Tensor
    zero_points: Tensor
    group_size: int
    bits: int

    def weight(self) -> Tensor:
        """The float32 weight [out, in]."""
        columns = self.q.shape[1]
        q = F.pad(self.q, (0, -columns % self.group_size)).unflatten(1, (-1, self.group_size))
        weight = torch.sub(q, self.zero_points[..., None]).mul_(self.scales[..., None])
        return weight.flatten(1)[:, :columns]
