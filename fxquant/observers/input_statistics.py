"""What a layer's input looks like, channel by channel."""

from copy import copy

import torch
from torch import Tensor

SAMPLE = 512  # tokens that are kept as they are
PRIOR_TOKENS = 128
TINY = torch.finfo(torch.float32).tiny


class InputStatistics:
    """Sums over tokens of a layer's input, and a sample of it.

    Args:
        shape: of what belongs to one token: [channels], the width of the input; or
            [blocks, channels], where each block of rows of a layer multiplies inputs of its own and
            all see equally many tokens, as the groups of a convolution do.
        sample_size: how many tokens are kept at most.

    Attributes:
        tokens: how many tokens were added; 0 also for statistics that no data made.
        mean: of each channel, float32 [*shape].
        mean_square: the mean square of each channel.
        mean_abs: the mean magnitude of each channel.
        lowest: the smallest value of each channel.
        highest: the largest value of each channel.
        sample: tokens spread over all batches, [at most `sample_size`, *shape].
    """

    def __init__(self, *shape: int, sample_size: int = SAMPLE) -> None:
        self.tokens, self.sample_size = 0, sample_size
        self.mean, self.mean_square, self.mean_abs = torch.zeros(3, *shape, dtype=torch.float32)
        self.lowest = torch.full(shape, torch.inf, dtype=torch.float32)
        self.highest = -self.lowest
        self.sample = torch.zeros(0, *shape, dtype=torch.float32)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: [..., *shape].
            mask: boolean [...], False for tokens that do not count (padding).
        """
        x, shape = x if mask is None else x[mask], self.mean.shape
        x = x.detach().reshape(-1, *shape).float()
        if not len(x):
            return
        batch = InputStatistics(*shape, sample_size=self.sample_size)
        batch.tokens, batch.sample = len(x), x
        batch.mean, batch.mean_square, batch.mean_abs = (
            x.mean(0),
            x.square().mean(0),
            x.abs().mean(0),
        )
        batch.lowest, batch.highest = x.amin(0), x.amax(0)
        self.merge(batch)

    def merge(self, other: "InputStatistics") -> None:
        """Add what `other` saw, as if it came after what was seen here."""
        if not other.tokens:
            return
        self.tokens += other.tokens
        share = other.tokens / self.tokens
        self.mean = torch.lerp(self.mean, other.mean, share)
        self.mean_square = torch.lerp(self.mean_square, other.mean_square, share)
        self.mean_abs = torch.lerp(self.mean_abs, other.mean_abs, share)
        self.lowest = torch.minimum(self.lowest, other.lowest)
        self.highest = torch.maximum(self.highest, other.highest)
        self._add_to_sample(other.sample, share)

    def steadied(self, expected: "InputStatistics | None" = None) -> "InputStatistics":
        """The mean and mean square as if `PRIOR_TOKENS` more tokens had looked as expected.

        A few tokens say little about how channels differ: taken at their word, they cost more than
        they bring.

        Args:
            expected: what the graph promises of the input; None: a mean of 0 and the same mean
                square in each channel.

        Returns:
            Statistics of which only `tokens`, `mean` and `mean_square` are set.
        """
        if not self.tokens:
            return self if expected is None else expected
        share = self.tokens / (self.tokens + PRIOR_TOKENS)
        mean = torch.zeros_like(self.mean)
        square = self.mean_square.mean(-1, keepdim=True).expand_as(mean)
        if expected is not None:  # which knows how channels differ, not how large they are
            size = self.mean_square.mean() / expected.mean_square.mean().clamp(min=TINY)
            mean, square = expected.mean * size.sqrt(), expected.mean_square * size
        steady = InputStatistics(*mean.shape)
        steady.tokens = self.tokens
        steady.mean = torch.lerp(mean, self.mean, share)
        steady.mean_square = torch.lerp(square, self.mean_square, share)
        return steady

    @property
    def largest(self) -> Tensor:
        """The largest magnitude of each channel, [channels]."""
        return torch.maximum(-self.lowest, self.highest)

    def by_block(self) -> "list[InputStatistics]":
        """Those of each block, which share the memory of these; of one block, these themselves."""
        if self.mean.ndim == 1:
            return [self]
        columns = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        sample = columns.pop("sample").unbind(1)
        blocks = []
        for number, values in enumerate(zip(*(v.unbind() for v in columns.values()), strict=True)):
            block = copy(self)
            vars(block).update(zip(columns, values, strict=True), sample=sample[number])
            blocks.append(block)
        return blocks

    def _add_to_sample(self, x: Tensor, share: float) -> None:
        """Keep as many of the new tokens as their share, evenly spaced; the same every time."""
        size = self.sample_size
        new = min(len(x), size, max(1, round(size * share)))
        kept = min(len(self.sample), size - new)
        old = self.sample[_spaced(len(self.sample), kept)]
        self.sample = torch.cat((old, x[_spaced(len(x), new)]))


def _spaced(length: int, count: int) -> Tensor:
    return (torch.arange(count) * length) // max(count, 1)
