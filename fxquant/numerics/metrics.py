"""How far a quantized tensor is from the float one."""

import math

import torch
from torch import Tensor

LEAST_NORM, LARGEST_NORM = 1e-12, 1e18  # squares far inside float32's range


class SqnrMeter:
    """Signal and noise power summed over batches, in float64.

    >>> meter = SqnrMeter()
    >>> meter.add(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
    >>> meter.db
    20.0
    """

    def __init__(self) -> None:
        self._signal = torch.zeros((), dtype=torch.float64)
        self._noise = torch.zeros((), dtype=torch.float64)
        self._count = 0
        self.has_other_shapes = False

    def add(self, reference: Tensor, approximation: Tensor) -> None:
        """Add a pair of tensors; of two of different shapes there is no ratio, then and later."""
        if reference.shape != approximation.shape:
            self.has_other_shapes = True
            return
        self._count += 1
        reference, approximation = reference.detach().float(), approximation.detach().float()
        self._signal += squared_sum(reference)
        self._noise += squared_sum(approximation - reference)

    def merge(self, other: "SqnrMeter") -> None:
        """Add what another meter has seen."""
        self._signal += other._signal
        self._noise += other._noise
        self._count += other._count
        self.has_other_shapes |= other.has_other_shapes

    def __getstate__(self) -> tuple[float, float, int, bool]:
        """Plain numbers, which are small in a pickle."""
        return self._signal.item(), self._noise.item(), self._count, self.has_other_shapes

    def __setstate__(self, state: tuple[float, float, int, bool]) -> None:
        signal, noise, self._count, self.has_other_shapes = state
        self._signal, self._noise = torch.tensor([signal, noise], dtype=torch.float64)

    @property
    def noise(self) -> float:
        """The noise power so far."""
        return self._noise.item()

    @property
    def db(self) -> float:
        """The ratio so far, in decibels; NaN where shapes differed."""
        return (
            math.nan
            if self.has_other_shapes
            else power_ratio_db(self._signal.item(), self._noise.item())
        )

    @property
    def db_or_none(self) -> float | None:
        """The ratio, or None if nothing was added or shapes differed."""
        return self.db if self._count and not self.has_other_shapes else None


def squared_sum(x: Tensor) -> Tensor:
    """The sum of squares as a float64 scalar tensor.

    Summed in float32, which is several times faster, unless the squares overflow or vanish there.
    """
    norm = torch.linalg.vector_norm(x)
    if not LEAST_NORM < norm < LARGEST_NORM:
        norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.double().square()


def power_ratio_db(signal: float, noise: float) -> float:
    """10 · log10(signal / noise); infinite without noise, NaN where either is NaN."""
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB: 10 · log10(Σ reference² / Σ (approx − reference)²).

    Args:
        reference: the float tensor, any shape.
        approximation: the quantized tensor, the same shape.

    Returns:
        The ratio; infinite where the two are equal.
    """
    meter = SqnrMeter()
    meter.add(reference, approximation)
    return meter.db
