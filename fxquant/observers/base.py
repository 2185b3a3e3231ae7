"""What all observers share: state in buffers, no host synchronisation while observing."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from fxquant.errors import CalibrationError, OptionError
from fxquant.numerics.integers import UINT8


@dataclass(frozen=True)
class ActivationStatistics:
    """What an observer saw.

    Attributes:
        low: the smallest value.
        high: the largest value.
        rms: the root mean square.
        outlier_ratio: the largest magnitude divided by the rms; about 4 for normal data.
        count: how many values.
    """

    low: float
    high: float
    rms: float
    outlier_ratio: float
    count: int


class Observer(nn.Module):
    """Watches a tensor and gives the uint8 grid for it: x ≈ scale · (q − zero_point).

    NaN and Inf are noted while observing and reported when a result is asked for, so that
    observing never waits for the device.
    """

    minimum: Tensor
    maximum: Tensor
    square_sum: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.node_name = type(self).__name__
        self.register_buffer("minimum", torch.tensor(torch.inf))
        self.register_buffer("maximum", torch.tensor(-torch.inf))
        self.register_buffer("square_sum", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Note the values of `x`, any shape, and return `x` itself."""
        if not x.is_floating_point():
            raise CalibrationError(
                self.node_name,
                found=f"a tensor of {x.dtype}",
                needed="a floating-point activation",
                remedy="Observe activations, not token ids or masks.",
            )
        if x.numel():
            values = x.detach().float()
            low, high = values.aminmax()
            self.square_sum += torch.linalg.vector_norm(values, dtype=torch.float64).square()
            self.count += values.numel()
            self._observe(values, low, high)
        return x

    def _observe(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        # minimum and maximum keep NaN, so one bad value is never forgotten
        self.minimum = torch.minimum(self.minimum, low)
        self.maximum = torch.maximum(self.maximum, high)

    def check(self) -> None:
        """Raise a `CalibrationError` that names the node if NaN or Inf was seen."""
        if self.has_seen_values and not torch.isfinite(self.maximum - self.minimum):
            raise CalibrationError(
                self.node_name,
                found="NaN or Inf in its activation",
                needed="finite activations",
                remedy="Look for the batch that causes it, or for float16 overflow.",
            )

    @property
    def has_seen_values(self) -> bool:
        """Whether anything was observed."""
        return bool(self.count > 0)

    def statistics(self) -> ActivationStatistics:
        """Range, rms and outlier ratio of what was seen.

        Raises:
            CalibrationError: it saw nothing, NaN or Inf.
        """
        self._check_ready()
        low, high = self.minimum.item(), self.maximum.item()
        rms = float((self.square_sum / self.count).sqrt())
        ratio = max(abs(low), abs(high)) / rms if rms else 1.0
        return ActivationStatistics(low, high, rms, ratio, int(self.count))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The grid for what was seen.

        Returns:
            `(scale, zero_point)`: a float32 and an int32 scalar. The grid contains an exact zero,
            and the zero point lies in 0..255.

        Raises:
            CalibrationError: it saw nothing, NaN or Inf.
        """
        self._check_ready()
        return qparams_of_range(*self._range())

    def _check_ready(self) -> None:
        if not self.has_seen_values:
            raise CalibrationError(
                self.node_name,
                found="no observed values",
                needed="calibration data that reaches this node",
                remedy="Run fxquant.calibrate with representative data first.",
            )
        self.check()

    @abstractmethod
    def _range(self) -> tuple[Tensor, Tensor]:
        """The values that the grid spans."""

    def reset(self) -> None:
        """Forget everything."""
        self.minimum = torch.full_like(self.minimum, torch.inf)
        self.maximum = torch.full_like(self.maximum, -torch.inf)
        self.square_sum = torch.zeros_like(self.square_sum)
        self.count = torch.zeros_like(self.count)

    def merge(self, other: Self) -> None:
        """Add what `other` saw, as if this observer had seen it too.

        Raises:
            OptionError: `other` is of another kind or has other options.
        """
        if type(other) is not type(self) or self._options() != other._options():
            raise OptionError(
                f"{self.node_name}.merge",
                found=f"{type(other).__name__}{other._options()}",
                needed=f"{type(self).__name__}{self._options()}",
                remedy="Merge observers of one kind with the same options.",
            )
        self._merge(other)
        self.minimum = torch.minimum(self.minimum, other.minimum)
        self.maximum = torch.maximum(self.maximum, other.maximum)
        self.square_sum = self.square_sum + other.square_sum
        self.count = self.count + other.count

    def _merge(self, other: Self) -> None:
        """Merge what a subclass adds; called before the common state is merged."""

    def _options(self) -> tuple[object, ...]:
        return ()


def qparams_of_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The uint8 grid that spans `low`..`high`, scalars, and zero."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale = (high - low) / UINT8.quant_max
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.where(scale < tiny, torch.ones_like(scale), scale)
    zero_point = (-low / scale).round().clamp(UINT8.quant_min, UINT8.quant_max)
    return scale, zero_point.to(torch.int32)
