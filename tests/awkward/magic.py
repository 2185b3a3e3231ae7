"""Overridden methods of Python's and torch's, and layers that are not what they say."""

import torch
from torch import nn

from tests.awkward.registry import Two, W, awkward


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@awkward()
class IsFalse(Base):
    """`bool(model)` is False, and so is that of a child."""

    def __init__(self):
        super().__init__()
        self.empty = nn.ModuleList()

    def __len__(self):
        return 0

    def forward(self, x):
        return super().forward(x) if not self.empty else x


@awkward()
class IsIterable(Base):
    """A model that can be indexed and iterated."""

    def __getitem__(self, index):
        return (self.first, self.second)[index]

    def __iter__(self):
        return iter((self.first, self.second))

    def forward(self, x):
        for layer in self:
            x = layer(torch.relu(x))
        return x + self[0](x)


@awkward(layers=("first", "second"))
class OverridesCall(Base):
    """`__call__` of the model does more than forward."""

    def __call__(self, x):
        return super().__call__(x * 2) + 1


@awkward()
class CannotBePrinted(Base):
    """`repr` raises."""

    def __repr__(self):
        raise RuntimeError("do not print me")


@awkward(layers=("first", "second"))
class HidesItsParameters(Base):
    """`named_parameters` and `state_dict` tell other names than the attributes."""

    def named_parameters(self, *args, **kwargs):
        for name, parameter in super().named_parameters(*args, **kwargs):
            if not name.startswith("first"):
                yield name, parameter

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {f"net/{name}": value for name, value in state.items()}


@awkward(layers=("first", "second"))
class RefusesToMove(Base):
    """`to` and its kin raise, as for models that are quantized elsewhere."""

    def _apply(self, function, recurse=True):
        raise ValueError("this model cannot be moved")


@awkward()
class AnswersEverything(Base):
    """`__getattr__` has an answer for any name."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return lambda *args: None


@awkward()
class CountsWrites(Base):
    """`__setattr__` keeps a record of what is set."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        self.__dict__.setdefault("written", []).append(name)


class Halves(nn.Module):
    def forward(self, x):
        return x[..., : W // 2]


@awkward(layers=("1", "3"))
def features_that_lie():
    """`in_features` of a layer whose weight has been cut to half."""
    first, second = nn.Linear(W, W), nn.Linear(W, W)
    first.weight = nn.Parameter(first.weight[:, : W // 2].detach())
    second.out_features = 1
    return nn.Sequential(Halves(), first, nn.ReLU(), second)


@awkward(layers=("first", "second"), int4=("second",))
def weight_is_a_buffer():
    """The weight and bias of a frozen layer are buffers."""
    model = Two()
    for name in ("weight", "bias"):
        value = getattr(model.first, name).detach()
        delattr(model.first, name)
        model.first.register_buffer(name, value)
    return model


@awkward(layers=("first", "second"), int4=("second",), own=False)
def weight_is_an_attribute():
    """The weight of a layer is a plain tensor."""
    model = Two()
    value = model.first.weight.detach()
    del model.first.weight
    model.first.weight = value
    return model


@awkward()
def two_layers_with_one_weight():
    """One Parameter in two layers with biases of their own."""
    model = Two()
    model.second.weight = model.first.weight
    return model


@awkward(own=False)
def one_memory_in_two_layers():
    """A weight that is the transposed memory of another, by another Parameter."""
    model = Two()
    model.second.weight = nn.Parameter(model.first.weight.detach().t())
    return model


@awkward()
def zero_weights():
    """An adapter that begins with zeros, and constant rows."""
    model = Two()
    model.first.weight.data[:8] = 0
    model.first.weight.data[8:16] = 0.25
    model.second.weight.data[1:2] = 0
    return model


@awkward()
def tiny_and_huge_weights():
    """Weights of 1e-12 beside a gain of 1e12."""
    model = Two()
    model.first.weight.data *= 1e-12
    model.first.bias.data *= 1e-12
    model.norm.eps = 1e-30
    return model


@awkward()
class MinusInfinity(Base):
    """Outputs that are -inf in places, as masked logits are."""

    def forward(self, x):
        y = super().forward(x)
        y[..., 3] = float("-inf")
        return y, y.exp()[:, :0]


@awkward()
class KeepsGradientsOn(Base):
    """Parameters that are frozen but one, and an output that is detached beside one that is not."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        self.second.bias.requires_grad_(True)

    def forward(self, x):
        y = super().forward(x)
        return y, y.detach() * 2
