"""Modules that remember: counters, caches, buffers, layers made on the way."""

import collections
import functools

import torch
import torch.nn.functional as F
from torch import nn

from tests.awkward.registry import W, awkward


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)


@awkward()
class CountsItsCalls(Base):
    """A counter that the output does not depend on."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.second(torch.relu(self.first(x)))


@awkward()
class OutputDependsOnTheCount(Base):
    """Each call scales by the number of calls so far."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.second(torch.relu(self.first(x))) * self.calls


@awkward()
class Alternates(Base):
    """A flag that each call toggles."""

    def __init__(self):
        super().__init__()
        self.flag = False

    def forward(self, x):
        self.flag = not self.flag
        return self.second(self.first(x) if self.flag else x)


@awkward()
class KeepsItsLastOutput(Base):
    """The output stays on self, as loss terms do."""

    last = None

    def forward(self, x):
        self.last = self.first(x)
        return self.second(torch.relu(self.last))


@awkward(sizes=((3, 5), (3, 5), (3, 5)))
class AddsItsLastOutput(Base):
    """What the previous call returned is part of the next."""

    last = None

    def forward(self, x):
        y = self.second(torch.relu(self.first(x)))
        if self.last is not None:
            y = y + 0.1 * self.last
        self.last = y
        return y


@awkward(sizes=((3, 5), (3, 2), (3, 1)))
class AppendsToACache(Base):
    """Keys of all calls, in a list of the module's."""

    def __init__(self):
        super().__init__()
        self.keys = []

    def forward(self, x):
        self.keys.append(self.first(x))
        keys = torch.cat(self.keys, dim=1)
        weights = torch.softmax(x @ keys.transpose(1, 2) / 8, -1)
        return self.second(weights @ keys)


@awkward()
class KeepsAHistory(Base):
    """A queue of means that the output is centered by."""

    def __init__(self):
        super().__init__()
        self.means = collections.deque(maxlen=3)

    def forward(self, x):
        h = self.first(x)
        self.means.append(h.mean())
        return self.second(h - sum(self.means) / len(self.means))


@awkward()
class UpdatesABuffer(Base):
    """A running mean that is updated in place while evaluating."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(W))

    def forward(self, x):
        h = self.first(x)
        self.mean.mul_(0.9).add_(h.mean((0, 1)), alpha=0.1)
        return self.second(h - self.mean)


@awkward()
class ReplacesABuffer(Base):
    """The same by assigning a new tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.steps = self.steps + 1
        return self.second(self.first(x)) / self.steps


@awkward()
class UpdatesAParameter(Base):
    """A codebook that forward moves."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(8, W), requires_grad=False)

    def forward(self, x):
        h = self.first(x)
        self.codes.data.lerp_(h.mean((0, 1)), 0.05)
        nearest = torch.cdist(h.flatten(0, 1), self.codes).argmin(-1)
        return self.second(0.1 * self.codes[nearest].view_as(h) + h)


@awkward()
class MakesALayerOnTheFirstCall(Base):
    """A layer that is registered in the first forward."""

    def __init__(self):
        super().__init__()
        self.extra = None

    def forward(self, x):
        if self.extra is None:
            self.extra = nn.Linear(W, W).requires_grad_(False)
            self.extra.weight.copy_(torch.eye(W))
        return self.second(torch.relu(self.first(x) + self.extra(x)))


@awkward()
class KeepsAMask(Base):
    """A causal mask that is made anew when a longer input comes."""

    mask = None

    def forward(self, x):
        n = x.shape[1]
        if self.mask is None or self.mask.shape[0] < n:
            self.mask = torch.full((n, n), float("-inf")).triu(1)
        h = self.first(x)
        scores = h @ h.transpose(1, 2) / 8 + self.mask[:n, :n]
        return self.second(scores.softmax(-1) @ h)


@awkward()
class GrowsItsTables(Base):
    """Rotary tables in buffers that grow with the length."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", 1.0 / 100 ** (torch.arange(W // 2) / (W // 2)))
        self._tables(4)

    def _tables(self, length):
        angles = torch.outer(torch.arange(length).float(), self.frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x):
        n = x.shape[1]
        if n > self.cos.shape[0]:
            self._tables(n)
        a, b = self.first(x).chunk(2, -1)
        cos, sin = self.cos[:n], self.sin[:n]
        return self.second(torch.cat((a * cos - b * sin, a * sin + b * cos), -1))


@awkward()
class Memoizes(Base):
    """A dict of positions by length."""

    def __init__(self):
        super().__init__()
        self.memo = {}

    def forward(self, x):
        n = x.shape[1]
        if n not in self.memo:
            self.memo[n] = torch.linspace(0, 1, n)[:, None]
        return self.second(torch.relu(self.first(x) + self.memo[n]))


@awkward(own=False, int4=("second",))
class CachedProperty(Base):
    """`functools.cached_property` puts a tensor among the attributes at the first call."""

    @functools.cached_property
    def scale(self):
        return self.first.weight.detach().abs().mean() * 10

    def forward(self, x):
        return self.second(torch.relu(self.first(x) * self.scale))


class Cache:
    """Keys that grow, as transformers' caches do."""

    def __init__(self):
        self.keys = None

    def update(self, keys):
        self.keys = keys if self.keys is None else torch.cat((self.keys, keys), 1)
        return self.keys


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(W, W) for _ in range(3))

    def forward(self, x, cache):
        q, k = self.q(x), cache.update(self.k(x))
        if x.abs().mean() < 0:
            q = -q
        return self.o((q @ k.transpose(1, 2) / 8).softmax(-1) @ k)


@awkward()
class HandsACacheToAChild(nn.Module):
    """A cache made in forward goes to a child that cannot be traced, twice."""

    def __init__(self):
        super().__init__()
        self.a = Attention()

    def forward(self, x):
        cache = Cache()
        y = self.a(x, cache)
        y = y + self.a(y, cache)
        return y if y.mean() > -1e9 else x


@awkward()
class ReturnsItsCache(nn.Module):
    """Children append to a list that the model returns."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(KeyValue() for _ in range(2))

    def forward(self, x):
        cache = []
        for layer in self.layers:
            x = x + layer(x, cache)
        return x, cache


class KeyValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.k, self.v = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x, cache):
        k, v = self.k(x), self.v(x)
        cache.append((k, v))
        return (x @ k.transpose(1, 2) / 8).softmax(-1) @ v


@awkward(sizes=((3, 5), (3, 2)))
class CacheOfTheModel(nn.Module):
    """A cache object on self that a child of the model writes to."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.cache = Cache()

    def forward(self, x):
        return self.attention(x, self.cache)


@awkward(inputs=lambda b, n: {"x": torch.randn(b, n, W), "past": [torch.randn(b, 4, W)]})
class TakesAPast(Base):
    """A list of past keys is an argument, and forward appends to it."""

    def forward(self, x, past):
        past.append(self.first(x))
        keys = torch.cat(past, 1)
        return self.second((x @ keys.transpose(1, 2) / 8).softmax(-1) @ keys), keys


@awkward(sizes=((3, 5), (3, 5), (3, 2)))
class HiddenStateStays(Base):
    """A recurrence whose hidden state stays from call to call."""

    def __init__(self):
        super().__init__()
        self.hidden = None

    def forward(self, x):
        outputs = []
        hidden = torch.zeros(x.shape[0], W) if self.hidden is None else self.hidden
        for row in x.unbind(1):
            hidden = torch.tanh(self.first(row) + self.second(hidden))
            outputs.append(hidden)
        self.hidden = hidden
        return torch.stack(outputs, 1)


@awkward()
class TakesStatistics(Base):
    """A batch norm that has no running statistics, and one that updates them in eval mode."""

    def __init__(self):
        super().__init__()
        self.without = nn.BatchNorm1d(W, track_running_stats=False)
        self.register_buffer("mean", torch.zeros(W))
        self.register_buffer("var", torch.ones(W))

    def forward(self, x):
        h = self.without(self.first(x).transpose(1, 2))
        h = F.batch_norm(h, self.mean, self.var, training=True)
        return self.second(h.transpose(1, 2))


@awkward()
class Profiles(Base):
    """Shapes that passed, in a dict of lists on a shared object."""

    class Profile:
        __slots__ = ("shapes", "total")

        def __init__(self):
            self.shapes, self.total = collections.defaultdict(list), 0

    def __init__(self):
        super().__init__()
        self.profile = self.Profile()

    def forward(self, x):
        self.profile.shapes[x.ndim].append(tuple(x.shape))
        self.profile.total += x.numel()
        return self.second(torch.relu(self.first(x)))
