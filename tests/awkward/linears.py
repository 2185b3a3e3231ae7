"""Linear layers whose class does more than a product, or that are called in other ways."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.awkward.registry import Two, W, awkward


class Scaled(nn.Linear):
    scale = 0.25

    def forward(self, x):
        return super().forward(x) * self.scale


class Cosine(nn.Linear):
    def forward(self, x):
        return 8 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=1), self.bias)


class Cast(nn.Linear):
    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Standardized(nn.Linear):
    def forward(self, x):
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, weight / weight.std(1, keepdim=True) / 8, self.bias)


class Masked(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.ones(outputs, inputs).tril())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class Equalized(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 1.5, self.bias * 1.5)


class Clamping(nn.Linear):
    def forward(self, x):
        self.weight.data.clamp_(-0.1, 0.1)
        return F.linear(x, self.weight, self.bias)


class Activated(nn.Linear):
    def forward(self, x):
        return F.gelu(F.linear(x, self.weight, self.bias))


class Noisy(nn.Linear):
    def forward(self, x):
        noise = torch.randn_like(self.weight) if self.training else 0
        return F.linear(x, self.weight + 0.1 * noise, self.bias)


class Fake(nn.Linear):
    def forward(self, x):
        scale = self.weight.abs().amax(1, keepdim=True) / 127
        return F.linear(x, (self.weight / scale).round() * scale, self.bias)


class Renamed(nn.Linear):
    pass


class CallsItself(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class OtherMemory(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(torch.randn(inputs, outputs).t() / 8)


def _subclass(kind, **facts):
    """A `Two` whose first layer is of a subclass of Linear."""

    def build():
        return Two(kind)

    build.__name__ = f"first_layer_is_{kind.__name__}"
    build.__doc__ = f"A Linear whose class is {kind.__name__}."
    awkward(**{"layers": ("first", "second"), **facts})(build)


for _kind in (Scaled, Cosine, Standardized, Masked, Equalized, Clamping, Activated, Noisy, Fake):
    _subclass(_kind, own=False, int4=("second",))
_subclass(CallsItself, own=False, int4=("second",))
_subclass(Cast, own=False)
_subclass(Renamed)
_subclass(OtherMemory)


@awkward(own=False, int4=("second",), layers=("first", "second"))
class ExtraArgument(nn.Module):
    """A Linear whose forward takes a scale beside the input."""

    class Layer(nn.Linear):
        def forward(self, x, scale, shift=0.0):
            return F.linear(x, self.weight, self.bias) * scale + shift

    def __init__(self):
        super().__init__()
        self.first, self.second = self.Layer(W, W), nn.Linear(W, W)

    def forward(self, x):
        return self.second(self.first(x, 0.5, shift=x.mean()))


@awkward(own=False, int4=("second",), layers=("first", "second"))
class ReturnsTwo(nn.Module):
    """A Linear that returns its output and its bias, as Megatron's does."""

    class Layer(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight), self.bias

    def __init__(self):
        super().__init__()
        self.first, self.second = self.Layer(W, W), nn.Linear(W, W)

    def forward(self, x):
        y, bias = self.first(x)
        return self.second(torch.relu(y + bias))


@awkward()
class CalledByKeyword(nn.Module):
    """`fc(input=x)`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x):
        return self.second(torch.relu(self.first(input=x)))


@awkward(own=False)
class ForwardCalled(nn.Module):
    """`fc.forward(x)` instead of `fc(x)`: nothing tells it from code that reads the weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x):
        return self.second.forward(torch.relu(self.first.forward(x)))


@awkward(layers=("narrow", "odd", "one", "wide"))
class OddWidths(nn.Module):
    """Widths that are no multiples of anything, down to one."""

    def __init__(self):
        super().__init__()
        self.narrow, self.odd = nn.Linear(W, 7), nn.Linear(7, 51)
        self.one, self.wide = nn.Linear(51, 1), nn.Linear(1, W)

    def forward(self, x):
        odd = self.odd(torch.relu(self.narrow(x)))
        return self.wide(self.one(odd)) + x


OWN = {"layers": ("first", "second"), "own": False}


def matrix(*shape):
    return nn.Parameter(torch.randn(*shape) / 8)


class OwnScaled(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.scale = matrix(outputs, inputs), inputs**-0.5

    def forward(self, x):
        return F.linear(x, self.weight) * self.scale


class OwnNormed(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = matrix(outputs, inputs)

    def forward(self, x):
        return F.linear(F.rms_norm(x, (x.shape[-1],)), self.weight)


class OwnGated(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.gate = matrix(outputs, inputs), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x.mean(-1, keepdim=True) + F.linear(x, self.weight) * self.gate.sigmoid()


@awkward(**OWN)
def layer_with_a_scale():
    """A class with a weight that scales its product."""
    return Two(OwnScaled)


@awkward(**OWN)
def layer_with_a_norm():
    """A class with a weight that normalizes its input."""
    return Two(OwnNormed)


@awkward(**OWN)
def layer_with_a_gate():
    """A class with a weight that adds to its product."""
    return Two(OwnGated)


class Conv1D(nn.Module):
    """As in GPT-2: the weight is [in, out]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.nf, self.weight = outputs, matrix(inputs, outputs)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return rows.view(*x.shape[:-1], self.nf)


@awkward(**OWN)
def layer_that_is_transposed():
    """Another class for a linear layer, with the weight the other way around."""
    return Two(Conv1D)
