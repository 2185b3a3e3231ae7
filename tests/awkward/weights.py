"""Weights that are computed, and linear layers that do more than a product."""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.awkward.registry import Two, W, awkward, tokens


def old_norm(name, layer):
    """The older form, by a pre-hook, which warns that it is old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return getattr(nn.utils, name)(layer)


def on_first(change):
    """A `Two` whose first layer is changed in place."""
    model = Two()
    change(model.first)
    return model


@awkward()
def weight_norm():
    """Two parameters make one weight."""
    return on_first(parametrizations.weight_norm)


@awkward(layers=("first", "second"))
def old_weight_norm():
    """A pre-hook makes the weight, which is no parameter."""
    return on_first(lambda layer: old_norm("weight_norm", layer))


@awkward()
def spectral_norm():
    """Power iteration while training, and one tensor that the setter would overwrite."""
    return on_first(parametrizations.spectral_norm)


@awkward(layers=("first", "second"))
def old_spectral_norm():
    """The same by a pre-hook."""
    return on_first(lambda layer: old_norm("spectral_norm", layer))


@awkward()
def orthogonal():
    """A matrix exponential makes the weight."""
    return on_first(parametrizations.orthogonal)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(0, 1)


class LowRank(nn.Module):
    def forward(self, left, right):
        return left @ right

    def right_inverse(self, weight):
        left, scale, right = torch.linalg.svd(weight)
        return left[:, :16] * scale[:16], right[:16].contiguous()


class WeightDropout(nn.Module):
    def forward(self, weight):
        return F.dropout(weight, 0.5, self.training)


@awkward()
def doubled_weight():
    """A parametrization of one tensor without a right inverse."""
    return on_first(lambda m: parametrize.register_parametrization(m, "weight", Double()))


@awkward()
def symmetric_weight():
    """Half of what the parameter holds is never used."""
    return on_first(lambda m: parametrize.register_parametrization(m, "weight", Symmetric()))


@awkward()
def low_rank_weight():
    """A parametrization of two tensors."""
    return on_first(lambda m: parametrize.register_parametrization(m, "weight", LowRank()))


@awkward()
def weight_dropout():
    """A parametrization that draws random numbers while training."""
    return on_first(lambda m: parametrize.register_parametrization(m, "weight", WeightDropout()))


@awkward()
def two_parametrizations():
    """One on the other, and one on the bias."""

    def change(layer):
        parametrize.register_parametrization(layer, "weight", Symmetric())
        parametrize.register_parametrization(layer, "weight", Double())
        parametrize.register_parametrization(layer, "bias", Double())

    return on_first(change)


@awkward()
def parametrized_norm():
    """The parametrized module is no Linear."""
    model = Two()
    parametrize.register_parametrization(model.norm, "weight", Double())
    return model


@awkward(layers=("model",), int4=("model",))
def parametrized_root():
    """The model itself is a parametrized Linear."""
    layer = nn.Linear(W, W)
    parametrize.register_parametrization(layer, "weight", Double())
    return layer


@awkward(layers=("first", "second"))
def pruned():
    """A mask on the weight, by a pre-hook."""
    return on_first(lambda m: prune.l1_unstructured(m, "weight", 0.3))


@awkward(layers=("first", "second"))
def pruned_then_trained():
    """The weight attribute is stale: the next call computes another."""
    model = on_first(lambda m: prune.random_unstructured(m, "weight", 0.3))
    model.first.weight_orig.data.mul_(3)
    return model


@awkward(layers=("first", "second"))
def stale_weight_norm():
    """The state was loaded after the weight was computed."""
    model = on_first(lambda m: old_norm("weight_norm", m))
    state = copy.deepcopy(model.state_dict())
    state["first.weight_g"] *= torch.linspace(1, 5, W)[:, None]
    model.load_state_dict(state)
    return model


@awkward(layers=("first", "second"), eval_first=True)
def stale_spectral_norm():
    """The same of the other norm."""
    model = on_first(lambda m: old_norm("spectral_norm", m)).eval()
    state = copy.deepcopy(model.state_dict())
    state["first.weight_orig"] *= torch.linspace(0.5, 3, W)
    model.load_state_dict(state)
    return model


@awkward(layers=("first", "second"))
class SharedParametrization(nn.Module):
    """One parametrized layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(W, W))
        self.again = self.first
        self.second = nn.Linear(W, W)

    def forward(self, x):
        return self.second(torch.tanh(self.again(torch.tanh(self.first(x)))))


class LoraLinear(nn.Linear):
    """Merges its adapter into the weight for evaluation, and takes it out for training."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.randn(4, inputs) / 4)
        self.up = nn.Parameter(torch.randn(outputs, 4) / 4)
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            sign = -1 if self.merged else 1
            self.weight.data += sign * self.up @ self.down
            self.merged = not self.merged
        return self

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.T @ self.up.T


@awkward(own=False, int4=("second",))
def lora_that_merges():
    """`eval()` and `train()` change the weight."""
    return Two(LoraLinear)


@awkward(own=False, int4=("second",), eval_first=True)
def lora_that_is_merged():
    """The same, passed on in eval mode."""
    return Two(LoraLinear)


@awkward(layers=("base", "down", "up", "head"))
class LoraBeside(nn.Module):
    """An adapter beside a frozen layer, as peft has it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(W, W).requires_grad_(False)
        self.down, self.up = nn.Linear(W, 8, bias=False), nn.Linear(8, W, bias=False)
        self.head = nn.Linear(W, W)
        self.scaling = 0.5

    def forward(self, x):
        return self.head(torch.relu(self.base(x) + self.up(self.down(x)) * self.scaling))


@awkward()
class FusesOnEval(nn.Module):
    """`eval()` computes a buffer that forward reads, and `train()` deletes it."""

    def __init__(self):
        super().__init__()
        self.fc, self.gain = nn.Linear(W, W), nn.Parameter(torch.ones(W) * 1.5)

    def train(self, mode=True):
        super().train(mode)
        self.ready = None if mode else (self.gain * 2).detach()
        return self

    def forward(self, x):
        return self.fc(x) * (self.gain * 2 if self.ready is None else self.ready)


@awkward(layers=("second",), own=False)
class ProductWeight(nn.Module):
    """The weight of a product is a product of two parameters."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(W, 8)), nn.Parameter(torch.randn(8, W) / 8)
        self.second = nn.Linear(W, W)

    def forward(self, x):
        return self.second(F.linear(x, self.left @ self.right))


@awkward(layers=("maker", "second"), int4=("second",))
class WeightMadeFromInput(nn.Module):
    """A layer's output is the weight of the next product."""

    def __init__(self):
        super().__init__()
        self.maker, self.second = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x):
        weight = self.maker(x).transpose(1, 2)
        return self.second(x @ weight @ x / W)


@awkward(inputs=tokens, layers=("table", "fc", "head"), int4=("fc",))
class TableWithAMaxNorm(nn.Module):
    """A lookup scales rows of the table; the head, and a second lookup by function, read it too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, W, max_norm=1.0)
        self.fc, self.head = nn.Linear(W, W), nn.Linear(W, 50, bias=False)
        self.head.weight = self.table.weight
        self.other = nn.Parameter(torch.randn(50, W))

    def forward(self, ids):
        h = self.table(ids) + F.embedding(ids, self.other, max_norm=2.0)
        return self.head(torch.relu(self.fc(h)))


@awkward(layers=("first", "empty", "wide", "second"), int4=("first", "second"))
class LayersWithoutElements(nn.Module):
    """Layers of no inputs and of no outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)
        self.empty, self.wide = nn.Linear(W, 0), nn.Linear(0, W)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.second(h + self.wide(h[..., :0])), self.empty(h)


@awkward(layers=("first", "mixer"), int4=("first",))
class ComplexWeight(nn.Module):
    """A layer of complex numbers between real ones."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(W, W)
        self.mixer = nn.Linear(W // 2, W // 2, dtype=torch.complex64)

    def forward(self, x):
        real, imaginary = self.first(x).chunk(2, dim=-1)
        return torch.view_as_real(self.mixer(torch.complex(real, imaginary))).flatten(-2)
