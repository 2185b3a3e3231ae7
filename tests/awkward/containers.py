"""Layers found through containers, names, arguments and inheritance."""

import torch
from torch import nn

from tests.awkward.registry import Two, W, awkward


@awkward()
class PassesALayerOn(nn.Module):
    """A layer is an argument of a child."""

    class Applies(nn.Module):
        def forward(self, x, layer, times):
            for _ in range(times):
                x = torch.tanh(layer(x))
            return x

    def __init__(self):
        super().__init__()
        self.fc, self.applies, self.head = nn.Linear(W, W), self.Applies(), nn.Linear(W, W)

    def forward(self, x):
        return self.head(self.applies(x, self.fc, times=2))


class Recursive(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.fc = nn.Linear(W, W)
        self.inner = Recursive(depth - 1) if depth else None

    def forward(self, x):
        h = self.fc(x)
        if h.mean() < -1e9:
            return h
        return h if self.inner is None else h + self.inner(torch.relu(h))


@awkward()
def opaque_in_opaque_in_opaque():
    """Branches on data at every level."""
    return Recursive(3)


@awkward(layers=("fc1", "fc2"), own=True)
class LayersByName(nn.Module):
    """Layers found with getattr, and a property that returns one."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(W, W), nn.Linear(W, W)

    @property
    def last(self):
        return self.fc2

    def forward(self, x):
        return self.last(torch.relu(getattr(self, f"fc{1}")(x)))


@awkward(layers=("experts.a", "experts.b", "layers.0", "layers.1"))
class ModuleContainers(nn.Module):
    """A ModuleDict by key and a ModuleList by slices, reversed."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleDict({"a": nn.Linear(W, W), "b": nn.Linear(W, W)})
        self.layers = nn.ModuleList([nn.Linear(W, W), nn.Linear(W, W)])

    def forward(self, x):
        for name, layer in self.experts.items():
            x = x + layer(x) * (1 if name == "a" else 0.5)
        for layer in reversed(self.layers[:2]):
            x = torch.relu(layer(x))
        return x


class Overridden(nn.Sequential):
    def forward(self, x, scale=2.0):
        for layer in self:
            x = layer(x) * scale
        return x


@awkward()
def sequential_with_its_own_forward():
    """A subclass of Sequential that does something else."""
    return nn.Sequential(Overridden(nn.Linear(W, W), nn.ReLU()), nn.Linear(W, W))


@awkward(layers=("fc", "unused"), int4=("fc",))
class UnusedLayers(nn.Module):
    """A layer that forward never calls, which has a row all the same, and a None child."""

    def __init__(self):
        super().__init__()
        self.fc, self.unused, self.nothing = nn.Linear(W, W), nn.Linear(W, W), None
        self.register_module("none", None)
        self.register_buffer("no_buffer", None)
        self.register_parameter("no_parameter", None)

    def forward(self, x):
        return self.fc(x) if self.none is None else x


@awkward(own=False, blind=True, int4=("head",))
class RunsAChildWithOtherWeights(nn.Module):
    """`torch.func.functional_call` runs a child with scaled weights."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x):
        scaled = {name: p * 1.5 for name, p in self.fc.named_parameters()}
        return self.head(self.fc(x) + torch.func.functional_call(self.fc, scaled, (x,)))


@awkward()
class Checkpointed(nn.Module):
    """`torch.utils.checkpoint` around a block."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Two(), nn.Linear(W, W)

    def forward(self, x):
        h = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        return self.head(h)


@awkward()
class Inherits(Two):
    """forward of the parent class, called with super()."""

    def forward(self, x):
        return super().forward(x) + super().forward(-x)


@awkward()
class ChildrenLookedAt(nn.Module):
    """forward looks at the names and attributes of its children."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(W, W), nn.GELU(), nn.Linear(W, W)

    def forward(self, x):
        for name, child in self.named_children():
            x = child(x)
            if getattr(child, "in_features", 0) == W and name != "b":
                x = x + float(child.bias is not None)
        return x
