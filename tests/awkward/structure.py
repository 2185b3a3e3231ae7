"""How parents use their children, and where layers are kept."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.awkward.registry import Two, W, awkward, tokens


class Switch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x, double=False):
        return self.fc(x) * 2 if double else self.fc(x)


@awkward()
class TwoValuesOfAFlag(nn.Module):
    """A child is called with both values of a flag by a parent with a branch."""

    def __init__(self):
        super().__init__()
        self.child, self.head = Switch(), nn.Linear(W, W)

    def forward(self, x):
        h = self.child(x, double=False)
        if h.sum() > -1e12:
            h = h + self.child(x, double=True)
        return self.head(h)


class WithMemory(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.memory = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x, memory):
        return torch.tanh(self.q(x) + memory)

    def recall(self, x):
        return self.memory(x) * 0.5


@awkward()
class CallsAGrandchild(nn.Module):
    """A parent with a branch calls a layer of its child directly."""

    def __init__(self):
        super().__init__()
        self.child = WithMemory()

    def forward(self, x):
        memory = self.child.memory(x)
        return self.child(x, memory) if x.abs().mean() > 0 else x


@awkward()
class CallsAnotherMethod(nn.Module):
    """A method of the child other than forward is called."""

    def __init__(self):
        super().__init__()
        self.child, self.head = WithMemory(), nn.Linear(W, W)

    def forward(self, x):
        return self.head(self.child(x, self.child.recall(x)))


@awkward(own=False, int4=("head",))
class ReadsAWeight(nn.Module):
    """A parent with a branch reads the weight of its child beside calling it."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x):
        h = self.fc(x)
        if h.sum() > -1e12:
            h = h / self.fc.weight.norm() + self.fc.weight.abs().mean(1)
        return self.head(h)


@awkward()
class ReadsDtypeAndWidth(nn.Module):
    """As T5 does: the input is cast to the dtype of the layer's weight."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x):
        h = self.fc(x.to(self.fc.weight.dtype)) / self.fc.in_features**0.5
        return self.head(h.to(self.head.weight.device)) * self.head.bias.shape[0]


class Optional(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.fc, self.norm, self.scale = nn.Linear(W, W, bias=False), norm, None

    def forward(self, x):
        return self.fc(x) if self.norm is None else self.norm(self.fc(x))


@awkward()
class ReadsNoneFields(nn.Module):
    """A parent with a branch looks whether fields of its children are None."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Optional(), Optional(nn.LayerNorm(W))

    def forward(self, x):
        h = self.a(x)
        if x.sum() > -1e12 and self.a.norm is None and self.a.fc.bias is None:
            h = self.b(h) if self.b.norm is not None else x
        return h if self.a.scale is None else h * self.a.scale


@awkward()
class AsksForABias(nn.Module):
    """Code beside a layer goes another way where the layer has a bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W, bias=False), nn.Linear(W, W)

    def forward(self, x):
        h = self.first(x)
        return self.second(torch.relu(h) if self.first.bias is None else h)


@awkward(layers=("0", "2"))
class LayersInAPlainList(nn.Module):
    """A Python list, whose layers are registered under other names."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W)]
        for i, layer in enumerate(self.layers):
            self.add_module(str(i), layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@awkward(layers=("head",), int4=("head",), own=False)
class UnregisteredLayers(nn.Module):
    """Layers in a plain list and a dict that nothing registers."""

    def __init__(self):
        super().__init__()
        self.hidden = [nn.Linear(W, W)]
        self.by_name = {"a": nn.Linear(W, W)}
        self.head = nn.Linear(W, W)

    def forward(self, x):
        return self.head(torch.relu(self.by_name["a"](torch.relu(self.hidden[0](x)))))


@awkward(layers=("inner.fc", "head"))
class LayersInADictOfLists(nn.Module):
    """A registered layer that forward reaches through nested plain containers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.fc = nn.Linear(W, W)
        self.table = {"steps": [(self.inner.fc, 2.0)]}
        self.head = nn.Linear(W, W)

    def forward(self, x):
        for layer, scale in self.table["steps"]:
            x = layer(x) * scale
        return self.head(x)


@awkward(layers=("encoder.fc", "head"))
class OneLayerUnderTwoNames(nn.Module):
    """The decoder's layer is the encoder's."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.fc = self.decoder.fc = nn.Linear(W, W)
        self.head = nn.Linear(W, W)

    def forward(self, x):
        return self.head(torch.relu(self.decoder.fc(torch.relu(self.encoder.fc(x)))))


@awkward()
class SharedBlock(nn.Module):
    """One block, called six times, as in ALBERT."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Two(), nn.Linear(W, W)

    def forward(self, x):
        for _ in range(6):
            x = x + 0.5 * self.block(x)
        return self.head(x)


@awkward()
def same_layer_twice_in_a_sequential():
    """A Sequential that holds one layer at two places."""
    layer = nn.Linear(W, W)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(W, W))


class ScaledEmbedding(nn.Embedding):
    def forward(self, numbers):
        return super().forward(numbers) * 8


@awkward(inputs=tokens, layers=("fc", "out"), int4=("fc",))
class TiedToASubclass(nn.Module):
    """A head is tied to an embedding of another class."""

    def __init__(self):
        super().__init__()
        self.emb, self.fc = ScaledEmbedding(50, W), nn.Linear(W, W)
        self.out = nn.Linear(W, 50, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, numbers):
        if numbers.shape[1] > 64:
            raise ValueError("too long")
        return self.out(self.fc(self.emb(numbers)))


@awkward(inputs=tokens, layers=("fc", "emb"), int4=("fc",))
class TiedByFunction(nn.Module):
    """The embedding's weight is the head's, by `F.linear`."""

    def __init__(self):
        super().__init__()
        self.emb, self.fc = nn.Embedding(50, W), nn.Linear(W, W)

    def forward(self, numbers):
        return F.linear(self.fc(self.emb(numbers)), self.emb.weight)


@awkward(inputs=tokens, layers=("fc", "emb"), int4=("fc",))
class TiedByProduct(nn.Module):
    """The same by a product with the transposed weight."""

    def __init__(self):
        super().__init__()
        self.emb, self.fc = nn.Embedding(50, W), nn.Linear(W, W)

    def forward(self, numbers):
        return self.fc(self.emb(numbers)) @ self.emb.weight.T


@awkward(layers=("fc", "head"))
class KnowsItsParent(nn.Module):
    """A child keeps a list with its parent: a circle."""

    class Child(nn.Module):
        def __init__(self, parent):
            super().__init__()
            self.parent = [parent]

        def forward(self, x):
            return self.parent[0].fc(x)

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(W, W), nn.Linear(W, W)
        self.child = self.Child(self)

    def forward(self, x):
        return self.head(torch.relu(self.child(x)))


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *args, **kwargs):
        return x + self.inner(x, *args, **kwargs)


@awkward()
class ResidualsAroundFlags(nn.Module):
    """Wrappers that pass on whatever they get."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = Residual(Switch()), Residual(nn.Linear(W, W)), nn.Linear(W, W)

    def forward(self, x):
        return self.head(self.b(self.a(x, double=True)))


@awkward()
class PoolsAndUnpools(Two):
    """Pooling that hands its indices on, and pooling at random places."""

    def __init__(self):
        super().__init__()
        self.pool, self.unpool = nn.MaxPool1d(2, return_indices=True), nn.MaxUnpool1d(2)
        self.random = nn.FractionalMaxPool2d((1, 2), output_size=(3, W // 2))

    def forward(self, x):
        pooled, places = self.pool(self.first(x))
        h = self.unpool(pooled, places)
        taken = self.random(torch.stack((h, h, h), -2))[..., 0, :]
        return self.second(torch.cat((taken, pooled), -1))
