"""Forms of outputs."""

import collections
import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import ModelOutput

from tests.awkward.registry import W, awkward


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)


class Pair(NamedTuple):
    y: torch.Tensor
    hidden: tuple
    nothing: Any = None


@dataclasses.dataclass
class Result:
    y: torch.Tensor
    extra: Any = None


class Named(dict):
    """A dict with attributes, as many libraries have one."""

    def __getattr__(self, name):
        return self[name]


@dataclasses.dataclass
class HfOutput(ModelOutput):
    logits: torch.Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


class Holder:
    """An object with attributes, nothing else."""

    def __init__(self, y, n):
        self.y, self.n = y, n


@awkward()
class ReturnsANamedTuple(Base):
    """A NamedTuple with a nested tuple and a None."""

    def forward(self, x):
        h = self.first(x)
        return Pair(self.second(h), (h, (x,)))


@awkward()
class ReturnsADataclass(Base):
    """A dataclass with a list."""

    def forward(self, x):
        h = self.first(x)
        return Result(self.second(h), [h, {"x": x}])


@awkward()
class ReturnsADict(Base):
    """A dict with an integer tensor, a number and a text beside."""

    def forward(self, x):
        h = self.first(x)
        return {"best": h.argmax(-1), "y": self.second(h), "width": W, "name": "base", "none": None}


@awkward()
class ReturnsADictSubclass(Base):
    """A dict of a class of its own."""

    def forward(self, x):
        return Named(y=self.second(torch.relu(self.first(x))), x=x)


@awkward()
class ReturnsAnOrderedDict(Base):
    """An OrderedDict whose order is not the order of computing."""

    def forward(self, x):
        h = self.first(x)
        return collections.OrderedDict(z=self.second(h), a=h)


@awkward()
class CallsAnOutputOut(Base):
    """A key of the outputs is the name of an argument of torch's functions."""

    def forward(self, x):
        h = torch.relu(self.first(x))
        return collections.OrderedDict(out=self.second(h), generator=h)


@awkward()
class ReturnsAModelOutput(Base):
    """A ModelOutput that leaves fields out."""

    def forward(self, x):
        h = self.first(x)
        return HfOutput(logits=self.second(h), hidden_states=(x, h))


@awkward()
class ReturnsNoneBeside(Base):
    """A tuple with None at both ends."""

    def forward(self, x):
        return None, self.second(torch.relu(self.first(x))), None


@awkward()
class ReturnsItsInput(Base):
    """An output that is an input, one that is twice there, and a view of one."""

    def forward(self, x):
        y = self.second(torch.relu(self.first(x)))
        return x, y, y, y[:, 0]


@awkward()
class ReturnsAListInAList(Base):
    """Nested lists and an empty tuple."""

    def forward(self, x):
        h = self.first(x)
        return [[self.second(h)], [h, [x]], ()]


@awkward()
class ReturnsATupleOfOne(Base):
    """A tuple of one."""

    def forward(self, x):
        return (self.second(torch.relu(self.first(x))),)


@awkward(own=False)
class ReturnsItsParameters(Base):
    """A parameter, a buffer and a shape are returned."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(3))
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.second(self.first(x)), self.gain, self.table, self.first.bias


@awkward()
class ReturnsShapes(Base):
    """Numbers that depend on the shape."""

    def forward(self, x):
        return self.second(torch.relu(self.first(x))), x.shape[1], x.shape


@awkward()
class ReturnsIntegersFirst(Base):
    """Integers and booleans come before the floating output."""

    def forward(self, x):
        h = self.first(x)
        return h.argmax(-1), h.sum(-1) > 0, self.second(h), torch.tensor(3)


@awkward()
class ReturnsComplex(Base):
    """A complex output beside a real one."""

    def forward(self, x):
        h = self.second(torch.relu(self.first(x)))
        return h, torch.complex(h, x)


@awkward()
class ReturnsHalf(Base):
    """A narrow and a wide output."""

    def forward(self, x):
        h = self.second(torch.relu(self.first(x)))
        return h, h.half(), h.bfloat16(), h.double()


@awkward(refused="floating tensor")
class ReturnsAnObject(Base):
    """An object that no library knows."""

    def forward(self, x):
        return Holder(self.second(torch.relu(self.first(x))), 3)


@awkward()
class ReturnsAScalar(Base):
    """A loss without dimensions, and the logits."""

    def forward(self, x):
        y = self.second(torch.relu(self.first(x)))
        return y.square().mean(), y


@awkward()
class UnpacksNamedTuples(nn.Module):
    """A child returns a NamedTuple, and the parent reads its fields and its places."""

    def __init__(self):
        super().__init__()
        self.child, self.head = ReturnsANamedTuple(), nn.Linear(W, W)

    def forward(self, x):
        pair = self.child(x)
        return self.head(pair.y + pair[1][0]) if pair.nothing is None else x


@awkward()
class UnpacksOpaqueOutputs(nn.Module):
    """A child with a branch returns a dataclass, which the parent looks into."""

    class Child(Base):
        def forward(self, x):
            h = self.first(x)
            return Result(self.second(h), h) if h.sum() > -1e12 else Result(h)

    def __init__(self):
        super().__init__()
        self.child, self.head = self.Child(), nn.Linear(W, W)

    def forward(self, x):
        result = self.child(x)
        return Result(self.head(result.y), None if result.extra is None else result.extra * 2)
