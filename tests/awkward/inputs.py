"""Forms of inputs."""

import collections
import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tests.awkward.registry import W, awkward, tokens


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)

    def apply_both(self, x):
        return self.second(torch.relu(self.first(x)))


def two(b, n):
    return (torch.randn(b, n, W), torch.randn(b, n, W))


@awkward(inputs=two, blind=True)
class TakesAnyNumber(Base):
    """`*tensors`."""

    def forward(self, *tensors):
        return self.apply_both(sum(tensors))


@awkward(inputs=lambda b, n: {"x": torch.randn(b, n, W), "y": torch.randn(b, n, W)}, blind=True)
class TakesAnyKeywords(Base):
    """`**tensors`."""

    def forward(self, **tensors):
        return self.apply_both(tensors["x"]) + sum(tensors.values())


@awkward(inputs=lambda b, n: {"x": torch.randn(b, n, W), "gain": torch.rand(())}, blind=True)
class TakesKeywordsBeside(Base):
    """An argument, a keyword-only one with a default, and `**kwargs`."""

    def forward(self, x, *, shift=0.5, **kwargs):
        return self.apply_both(x + shift) * kwargs.get("gain", 1.0)


@awkward(inputs=lambda b, n: {"x": torch.randn(b, n, W), "scale": torch.tensor(2.0)})
class KeywordOnly(Base):
    """Keyword-only arguments, one of which is not given."""

    def forward(self, *, x, mask=None, scale):
        h = self.apply_both(x) * scale
        return h if mask is None else h * mask


@awkward(inputs=lambda b, n: ([torch.randn(b, n, W), torch.randn(b, 2 * n, W)],), blind=True)
class TakesAList(Base):
    """A list of tensors, as pyramids are passed, is one input."""

    def forward(self, levels):
        return [self.apply_both(level) for level in levels]


@awkward(
    inputs=lambda b, n: ({"image": torch.randn(b, n, W), "more": (torch.randn(b, 1, W), 2.0)},),
    blind=True,
)
class TakesADict(Base):
    """A dict with a nested tuple and a number is one input."""

    def forward(self, batch):
        extra, scale = batch["more"]
        return self.apply_both(batch["image"] + extra) * scale


class Batch(NamedTuple):
    x: torch.Tensor
    lengths: torch.Tensor


@awkward(
    inputs=lambda b, n: (Batch(torch.randn(b, n, W), torch.full((b,), n - n // 2)),), blind=True
)
class TakesANamedTuple(Base):
    """A NamedTuple with lengths, from which a mask is made."""

    def forward(self, batch):
        positions = torch.arange(batch.x.shape[1])
        mask = positions[None] < batch.lengths[:, None]
        return self.apply_both(batch.x) * mask[..., None]


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    scale: float = 1.0


@awkward(inputs=lambda b, n: (Record(torch.ones(b, n, W) * 0.1 + 0.01, 2.0),), blind=True)
class TakesADataclass(Base):
    """A dataclass is one input."""

    def forward(self, record):
        x = record.x * torch.linspace(-1, 1, W)
        return self.apply_both(x) * record.scale


@awkward(inputs=lambda b, n: (collections.UserDict(x=torch.randn(b, n, W)),), blind=True)
class TakesAUserDict(Base):
    """A mapping that is no dict, as tokenizers return."""

    def forward(self, batch):
        return self.apply_both(batch["x"])


@awkward(inputs=lambda b, n: (torch.randn(b, n, W), 2, 0.5, "relu", True), blind=True)
class TakesPlainValues(Base):
    """A number of rounds, a scale, a name and a flag."""

    def forward(self, x, rounds, scale, name, double=False):
        for _ in range(rounds):
            x = getattr(F, name)(self.first(x)) * scale
        return self.second(x) * (2 if double else 1)


@awkward(inputs=lambda b, n: (torch.randn(b, n, W), torch.ones(n, n).triu(1).bool()))
class TakesASquareMask(Base):
    """A mask [T, T] that must grow with the length."""

    def forward(self, x, mask):
        h = self.first(x)
        scores = (h @ h.transpose(1, 2) / 8).masked_fill(mask, -1e9)
        return self.second(scores.softmax(-1) @ h)


@awkward(inputs=lambda b, n: (torch.randn(n, b, W), torch.zeros(b, n, dtype=torch.bool)), own=False)
class SequenceFirst(Base):
    """Inputs [T, B, C] with a padding mask [B, T]."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(W, 4)

    def forward(self, x, padding):
        mixed, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        return self.second(torch.relu(self.first(mixed) + x))


@awkward(inputs=lambda b, n: (torch.randn(b, n, W), torch.randn(b, 1, n, n)))
class TakesAnAdditiveMask(Base):
    """A mask [B, 1, T, T] that is added to the scores of heads."""

    def forward(self, x, mask):
        b, n, _ = x.shape
        h = self.first(x).view(b, n, 4, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(h, h, h, attn_mask=mask)
        return self.second(y.transpose(1, 2).reshape(b, n, W))


@awkward(
    inputs=lambda b, n: (torch.randint(0, 50, (b, n)), torch.arange(n).repeat(b, 1)),
    layers=("first", "second"),
    blind=True,
)
class TakesPositions(Base):
    """Tokens and their positions."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, W), nn.Embedding(20, W)

    def forward(self, numbers, positions=None):
        return self.apply_both(self.tokens(numbers) + self.positions(positions))


@awkward(inputs=lambda b, n: (torch.randn(b, 3, 8, 8),), sizes=((2, 1), (1, 1)))
class TakesImages(nn.Module):
    """Images, convolved, flattened, classified."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.first, self.second = nn.Linear(72, W), nn.Linear(W, 10)

    def forward(self, images):
        h = torch.relu(self.norm(self.conv(images)))
        return self.second(torch.relu(self.first(torch.flatten(h, 1))))


@awkward(inputs=lambda b, n: (torch.randint(0, 256, (b, n, W), dtype=torch.uint8),))
class TakesBytes(Base):
    """Pixels as bytes, that forward scales."""

    def forward(self, x):
        return self.apply_both(x.float() / 128 - 1)


@awkward(inputs=lambda b, n: (torch.randn(n, W),))
class WithoutABatch(Base):
    """Inputs [T, C]."""

    def forward(self, x):
        h = self.first(x)
        return self.second((h @ h.T / 8).softmax(-1) @ h)


@awkward(inputs=lambda b, n: (torch.randn(W),), sizes=((1, 1), (2, 1)))
class OneVector(Base):
    """One vector, no batch at all."""

    def forward(self, x):
        return self.apply_both(x)


@awkward(inputs=lambda b, n: (torch.randn(b, W, n).transpose(1, 2),))
class NotContiguous(Base):
    """An input with other strides."""

    def forward(self, x):
        return self.apply_both(x)


@awkward(inputs=lambda b, n: (torch.randn(b, n, W, requires_grad=True),))
class WantsAGradient(Base):
    """An input that requires a gradient."""

    def forward(self, x):
        return self.apply_both(x)


@awkward(inputs=lambda b, n: (torch.randn(b, n, W), None, {"unused": torch.ones(1)}))
class TakesWhatItDoesNotUse(Base):
    """A None and a dict that forward never looks at."""

    def forward(self, x, nothing, unused):
        return self.apply_both(x)


@awkward(inputs=lambda b, n: (torch.randn(b, n, W), torch.randn(b, n + 2, W)))
class TwoLengths(Base):
    """A query and a memory of another length."""

    def forward(self, x, memory):
        h = self.first(memory)
        return self.second((x @ h.transpose(1, 2) / 8).softmax(-1) @ h)


@awkward(inputs=lambda b, n: (torch.randn(b * n, W), torch.arange(b).repeat_interleave(n)))
class TakesAGraphOfRows(Base):
    """All rows in one, with the number of the group of each, as graph networks have it."""

    def forward(self, x, groups):
        h = self.first(x)
        sums = torch.zeros(int(groups.max()) + 1, W).index_add_(0, groups, h)
        return self.second(sums)


@awkward(inputs=lambda b, n: (torch.randn(b, n, W), torch.full((b,), n)), blind=True)
class PacksSequences(nn.Module):
    """A packed sequence goes through a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(W, W, batch_first=True), nn.Linear(W, W)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, False)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], True)[0])


@awkward(inputs=tokens)
class OneHot(Base):
    """Tokens become one-hot rows for a layer."""

    def forward(self, numbers):
        return self.apply_both(F.one_hot(numbers, W).float() * 4)


def defaults(b, n):
    return (torch.randn(b, n, W),)


@awkward(inputs=defaults)
class TensorsAsDefaults(Base):
    """A default argument is a tensor, another a list that forward must not change."""

    def forward(self, x, gain=torch.full((1,), 0.5), seen=()):  # noqa: B008 (that is the habit)
        return self.apply_both(x * gain) + len(seen)


def texts_and_codes(batch, length):
    return torch.randn(batch, length, W), torch.randn(4 * batch, W)


@awkward(inputs=texts_and_codes, sizes=((2, 5), (1, 5), (3, 9)))
class FourRowsForEachRow(nn.Module):
    """The second input has four rows for each row of the first; a single row goes another way."""

    def __init__(self):
        super().__init__()
        self.texts, self.codes = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x, codes):
        mixed = self.codes(codes).view(-1, 4, W).sum(1, keepdim=True)
        if codes.shape[0] // 4 == 1:
            mixed = mixed + 0.0
        return self.texts(x) + mixed


@awkward(sizes=((3, 5), (1, 5), (2, 9)))
class MeasuresTheBatch(Base):
    """The batch size by `len`, in a view and in a scale."""

    def forward(self, x):
        h = self.first(x)
        flat = h.reshape(len(h) * x.shape[1], W)
        return self.second(flat.view(len(x), -1, W)) / len(x)


def films(batch, length):
    return (torch.randn(batch, 4, 3, 8, 8),)


@awkward(inputs=films, sizes=((2, 0), (1, 0), (3, 0)))
class HasAFixedNumberOfFrames(nn.Module):
    """A film of four pictures has a table of times; for another number it is interpolated."""

    def __init__(self):
        super().__init__()
        self.patch, self.out = nn.Linear(3 * 64, W), nn.Linear(W, W)
        self.times = nn.Parameter(torch.randn(1, 4, W))

    def forward(self, x):
        times = self.times
        if x.shape[1] != times.shape[1]:
            times = nn.functional.interpolate(times.mT, size=(x.shape[1],), mode="nearest").mT
        return self.out(self.patch(x.flatten(2)) + times)


@awkward(inputs=lambda b, n: (torch.randn(b, n, W),) * 2, blind=True)
class PassesEverythingOn(nn.Module):
    """A wrapper whose forward is `*args, **kwargs` alone, around a model of two inputs."""

    class Inner(Base):
        """Takes an input that may be left out."""

        def forward(self, x, y=None):
            return self.apply_both(x if y is None else x - 0.5 * y)

    def __init__(self):
        super().__init__()
        self.inner = self.Inner()

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)
