"""What all observers share: state in buffers, no host synchronisation while observing."""

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from fxquant.errors import CalibrationError, OptionError, check_choice, check_type
from fxquant.numerics.integers import INT8, UINT8
from fxquant.observers.grid import Grid

INTEGERS = {integer.name: integer for integer in (UINT8, INT8)}


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
    """Watches a tensor and gives the 8-bit grid for it: x ≈ scale · (q − zero_point).

    NaN and Inf are noted while observing and reported when a result is asked for, so that
    observing never waits for the device. The state follows the observed tensors to their device.

    Args:
        integer: the integers of the grid, `"uint8"` or `"int8"`.
        symmetric: whether zero lies in the middle of them.

    Attributes:
        node_name: what is observed, for errors.
        batch: the number of the batch that is being observed, for errors.
    """

    minimum: Tensor
    maximum: Tensor
    square_sum: Tensor
    count: Tensor
    bad_batch: Tensor

    def __init__(self, *, integer: str = "uint8", symmetric: bool = False) -> None:
        super().__init__()
        check_choice("integer", integer, INTEGERS)
        self.integer, self.symmetric = integer, symmetric
        self.node_name = type(self).__name__
        self.batch = 0
        self.register_buffer("minimum", torch.tensor(torch.inf))
        self.register_buffer("maximum", torch.tensor(-torch.inf))
        self.register_buffer("square_sum", torch.zeros((), dtype=torch.float64))
        self.register_buffer("bad_batch", torch.full((), -1))  # the first with NaN or Inf
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def grid(self) -> Grid:
        """The integers that stand for the values."""
        return Grid(INTEGERS[self.integer], self.symmetric)

    def forward(self, x: Tensor) -> Tensor:
        """Note the values of `x`, floats of any shape, and return `x` itself.

        Raises:
            CalibrationError: `x` is no tensor, or holds integers, booleans or complex numbers.
        """
        check_type(self.node_name, x, Tensor, "Observe activations.", CalibrationError)
        if not x.is_floating_point():
            raise CalibrationError(
                self.node_name,
                found=f"a tensor of {x.dtype}",
                needed="a floating-point activation",
                remedy="Observe activations, not token ids or masks.",
            )
        if x.numel():
            self._note(x.detach().float())
        return x

    def _note(self, values: Tensor) -> None:
        if values.device != self.count.device:
            self.to(values.device)
        low, high = values.aminmax()
        is_bad = ~(torch.isfinite(low) & torch.isfinite(high))
        self.bad_batch = torch.where(is_bad & (self.bad_batch < 0), self.batch, self.bad_batch)
        # Row by row, since a float32 sum over millions of values drifts.
        norms = torch.linalg.vector_norm(values, dim=-1).double()
        self.square_sum = self.square_sum + norms.square().sum()
        self.count = self.count + values.numel()
        self._observe(values, low, high)

    def _observe(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        # minimum and maximum keep NaN, so one bad value is never forgotten
        self.minimum = torch.minimum(self.minimum, low)
        self.maximum = torch.maximum(self.maximum, high)

    def check(self) -> None:
        """Raise a `CalibrationError` that names the node if NaN or Inf was seen."""
        is_finite = torch.isfinite(self.minimum) & torch.isfinite(self.maximum)
        if self.has_seen_values and not is_finite:
            raise CalibrationError(
                self.node_name,
                found=f"NaN or Inf in its activation, first in batch {int(self.bad_batch)}",
                needed="finite activations",
                remedy="Look at that batch (they are counted from 0), or for float16 overflow.",
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
        largest = max(abs(low), abs(high))
        # Squares overflow in float32 from magnitudes of 1e19 on, and vanish below 1e-23.
        rms = min(math.sqrt(self.square_sum.item() / self.count.item()), largest)
        return ActivationStatistics(low, high, rms, largest / rms if rms else 1.0, int(self.count))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The grid for what was seen.

        Returns:
            `(scale, zero_point)`: a float32 and an int32 scalar. The grid contains an exact zero,
            and the zero point is one of its integers.

        Raises:
            CalibrationError: it saw nothing, NaN or Inf.
        """
        self._check_ready()
        scale, zero_point = self.grid.qparams(*self._range(self.grid))
        return scale.float(), zero_point.to(torch.int32)

    def clipping_range(self, finer: int = 1) -> tuple[Tensor, Tensor]:
        """The clipping range if the tensor had `finer` times as many levels.

        The more levels there are, the less there is to gain by clipping.

        Returns:
            `(low, high)`, scalars.

        Raises:
            CalibrationError: it saw nothing, NaN or Inf.
        """
        self._check_ready()
        integer = self.grid.integer
        most = (integer.quant_max + 1) * finer - 1
        finer_integer = replace(integer, quant_min=integer.quant_min * finer, quant_max=most)
        return self._range(replace(self.grid, integer=finer_integer))

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
    def _range(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """The least and the greatest value that the levels of `grid` should reach."""

    def reset(self) -> None:
        """Forget everything."""
        self.minimum = torch.full_like(self.minimum, torch.inf)
        self.maximum = torch.full_like(self.maximum, -torch.inf)
        self.square_sum = torch.zeros_like(self.square_sum)
        self.count = torch.zeros_like(self.count)
        self.bad_batch = torch.full_like(self.bad_batch, -1)

    def merge(self, other: Self) -> None:
        """Add what `other` saw, as if this observer had seen it too.

        Raises:
            OptionError: `other` is of another kind or has other options.
        """
        check_type(f"{self.node_name}.merge", other, Observer, "Pass an observer.")
        if type(other) is not type(self) or self._options() != other._options():
            raise OptionError(
                f"{self.node_name}.merge",
                found=f"{type(other).__name__} with {other._options()}",
                needed=f"{type(self).__name__} with {self._options()}",
                remedy="Merge observers of one kind with the same options.",
            )
        if not other.has_seen_values:
            return
        self._merge(other)
        self.bad_batch = torch.where(self.bad_batch < 0, other.bad_batch, self.bad_batch)
        self.minimum = torch.minimum(self.minimum, other.minimum)
        self.maximum = torch.maximum(self.maximum, other.maximum)
        self.square_sum = self.square_sum + other.square_sum
        self.count = self.count + other.count

    def _merge(self, other: Self) -> None:
        """Merge what a subclass adds; called before the common state is merged."""

    def _options(self) -> dict[str, object]:
        return {"integer": self.integer, "symmetric": self.symmetric}
