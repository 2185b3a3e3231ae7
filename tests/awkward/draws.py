"""Forwards that draw random numbers."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.awkward.registry import W, awkward


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)


@awkward()
class SamplesALatent(Base):
    """`torch.randn_like`, as variational models do."""

    def forward(self, x):
        h = self.first(x)
        return self.second(h + torch.randn_like(h) * torch.exp(0.1 * h))


@awkward()
class DrawsOfASize(Base):
    """`torch.rand` of a size that depends on the input."""

    def forward(self, x):
        noise = torch.rand(x.shape[0], x.size(1), W)
        return self.second(torch.relu(self.first(x)) + noise)


@awkward()
class AlwaysDrops(Base):
    """`F.dropout(training=True)`."""

    def forward(self, x):
        return self.second(F.dropout(self.first(x), 0.2, training=True))


@awkward()
class DrawsBernoulli(Base):
    """`torch.bernoulli`, and `bernoulli_` in place."""

    def forward(self, x):
        h = self.first(x)
        keep = torch.bernoulli(torch.full_like(h, 0.7))
        return self.second(h * keep + torch.empty_like(h).bernoulli_(0.5))


@awkward()
class DrawsInABranch(Base):
    """Noise is drawn only where a condition on data holds."""

    def forward(self, x):
        h = self.first(x)
        if h.abs().mean() > 1e-6:
            h = h + 0.1 * torch.randn(h.shape)
        return self.second(h)


@awkward()
class Shuffles(Base):
    """`randperm` of the length, undone after a layer."""

    def forward(self, x):
        order = torch.randperm(x.shape[1])
        h = self.first(x[:, order])[:, order.argsort()]
        return self.second(torch.relu(h) + x[:, order])


@awkward()
class SamplesTokens(Base):
    """`multinomial` over probabilities that a fixed table gives."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, W)

    def forward(self, x):
        chosen = torch.multinomial(torch.ones(x.shape[0], 8), x.shape[1], replacement=True)
        return self.second(torch.relu(self.first(x) + self.table(chosen)))


@awkward()
class GumbelNoise(Base):
    """`F.gumbel_softmax` over a part of the input."""

    def forward(self, x):
        weights = F.gumbel_softmax(x[..., :8], dim=-1)
        return self.second(self.first(x) * weights.mean(-1, keepdim=True) * 8)


@awkward()
class OwnGenerator(Base):
    """A torch generator of the module's own, sown anew in each call."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        noise = torch.randn(x.shape, generator=self.generator.manual_seed(5))
        return self.second(torch.relu(self.first(x)) + noise)


@awkward()
class PythonsAndNumpysRandom(Base):
    """Python's and numpy's generators, sown from the shape."""

    def forward(self, x):
        scale = random.Random(x.shape[1]).random()
        shift = np.random.default_rng(x.shape[0]).random()
        return self.second(torch.relu(self.first(x)) * scale + shift)


@awkward()
class SowsItsSeed(Base):
    """forward sets torch's seed, inside of fork_rng."""

    def forward(self, x):
        with torch.random.fork_rng():
            torch.manual_seed(11)
            noise = torch.randn(W)
        return self.second(torch.relu(self.first(x)) + noise)


class Monte(nn.Dropout):
    def forward(self, x):
        return F.dropout(x, self.p, True)


@awkward()
def monte_carlo_dropout():
    """A dropout layer that never stops."""
    return nn.Sequential(nn.Linear(W, W), Monte(0.2), nn.ReLU(), nn.Linear(W, W))
