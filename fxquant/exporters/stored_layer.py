"""A quantized layer as it was found in the files of another format."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StoredLayer:
    """A weight x ≈ scale · (q − zero_point), taken out of packed words.

    Attributes:
        q: whole numbers [out, in].
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
        scales, zero_points = (
            values.repeat_interleave(self.group_size, dim=1)[:, :columns]
            for values in (self.scales, self.zero_points)
        )
        return scales * (self.q - zero_points)
