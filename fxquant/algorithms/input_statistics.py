"""What a layer's input looks like, channel by channel."""

import torch
from torch import Tensor

SAMPLE = 512  # tokens that are kept as they are


class InputStatistics:
    """Sums over tokens of a layer's input, and a sample of it.

    Args:
        channels: the width of the input.

    Attributes:
        tokens: how many tokens were added; 0 also for statistics that no data made.
        mean: of each channel, float32 [channels].
        mean_square: the mean square of each channel.
        mean_abs: the mean magnitude of each channel.
        lowest: the smallest value of each channel.
        highest: the largest value of each channel.
        sample: tokens spread over all batches, [at most 512, channels].
    """

    def __init__(self, channels: int) -> None:
        self.tokens = 0
        self.mean, self.mean_square, self.mean_abs = torch.zeros(3, channels)
        self.lowest = torch.full((channels,), torch.inf)
        self.highest = -self.lowest
        self.sample = torch.zeros(0, channels)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: [..., channels].
            mask: boolean [...], False for tokens that do not count (padding).
        """
        x = x if mask is None else x[mask]
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        self.tokens += len(x)
        share = len(x) / self.tokens
        self.mean = torch.lerp(self.mean, x.mean(0), share)
        self.mean_square = torch.lerp(self.mean_square, x.square().mean(0), share)
        self.mean_abs = torch.lerp(self.mean_abs, x.abs().mean(0), share)
        self.lowest = torch.minimum(self.lowest, x.amin(0))
        self.highest = torch.maximum(self.highest, x.amax(0))
        self._add_to_sample(x, share)

    @property
    def largest(self) -> Tensor:
        """The largest magnitude of each channel, [channels]."""
        return torch.maximum(-self.lowest, self.highest)

    def _add_to_sample(self, x: Tensor, share: float) -> None:
        """Keep as many of the new tokens as their share, evenly spaced; the same every time."""
        new = min(len(x), SAMPLE, max(1, round(SAMPLE * share)))
        kept = min(len(self.sample), SAMPLE - new)
        old = self.sample[_spaced(len(self.sample), kept)]
        self.sample = torch.cat((old, x[_spaced(len(x), new)]))


def _spaced(length: int, count: int) -> Tensor:
    return (torch.arange(count) * length) // max(count, 1)
