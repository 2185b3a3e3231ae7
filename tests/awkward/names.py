"""Names that collide with Python's, torch's or the library's."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.awkward.registry import W, awkward


class Chain(nn.Module):
    """Children under the names given, one after another."""

    def __init__(self, *names):
        super().__init__()
        self.order = names
        for name in names:
            self.add_module(name, nn.Linear(W, W))

    def forward(self, x):
        for name in self.order:
            x = torch.relu(self._modules[name](x))
        return x


def _named(kind, *names):
    """Register a chain of layers under these names."""

    def build():
        return Chain(*names)

    build.__name__ = f"layers_named_like_{kind}"
    build.__doc__ = f"Layers called {', '.join(map(repr, names))}."
    awkward(layers=names)(build)


_named("a_graph", "graph", "code", "meta")
_named("keywords", "class", "lambda", "None", "import")
_named("methods", "forward_", "train_", "eval_", "call_module")
_named("builtins", "print", "len", "torch", "getattr", "dict")
_named("placeholders", "input", "x", "output", "args", "kwargs", "self")
_named("the_graph_itself", "self", "x", "output", "self_1")
_named("ours", "x_scale", "x_observer", "_self", "model", "quantized")
_named("symbols", "my-adapter", "a/b", "layer 1", "fc:0")
_named("letters", "ü", "層", "Straße", "0", "1_2")
_named("each_other", "a-b", "a_b", "a b", "A_b")
_named("nodes", "linear", "linear_1", "relu", "relu_1", "add", "get_attr")
_named("parts", "weight_", "in_proj", "original", "fc.weight".replace(".", "_"))


@awkward(layers=("heads.my-head", "heads.été", "heads.a b"))
class KeysOfADict(nn.Module):
    """A ModuleDict with dashes, accents and spaces."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({k: nn.Linear(W, W) for k in ("my-head", "été", "a b")})

    def forward(self, x):
        return {name: head(x) for name, head in self.heads.items()}


@awkward(layers=("model", "weight"), own=False)
class ChildCalledModel(nn.Module):
    """A child called `model` beside a weight of the root."""

    def __init__(self):
        super().__init__()
        self.model, self.weight = nn.Linear(W, W), nn.Parameter(torch.randn(W, W) / 8)

    def forward(self, x):
        return F.linear(torch.relu(self.model(x)), self.weight)


@awkward(layers=("weight", "bias"))
class ChildrenCalledWeightAndBias(nn.Module):
    """Layers called `weight` and `bias`."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x):
        return self.weight(x) + self.bias(x)


@awkward()
class AttributesNamedLikeOurs(nn.Module):
    """Attributes with the names that quantizing gives its own."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(W, W), nn.Linear(W, W)
        self.fc_observer, self.x_observer, self.activation = nn.Identity(), nn.Identity(), "int8"
        self.register_buffer("x_scale", torch.tensor(0.5))
        self.register_buffer("_scales", torch.tensor(2.0))
        self._self, self.fxquant_left_float, self.fxquant_info = 1, "mine", {"a": 1}
        self.graph, self.code, self.meta = 0.5, "return None", {"fxquant_info": 3}

    def forward(self, x):
        h = self.fc_observer(self.fc(self.x_observer(x))) * self.x_scale * self._self
        return self.head(torch.relu(h * self.graph)) / self._scales


@awkward(inputs=lambda b, n: {"graph": torch.randn(b, n, W), "input": torch.randn(b, n, W)})
class ArgumentsNamedLikeNodes(nn.Module):
    """Arguments called `graph` and `input`, and a layer that one of them shares its name with."""

    def __init__(self):
        super().__init__()
        self.fc, self.input = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, graph, input):
        return self.fc(graph) + self.input(input)


@awkward(layers=("a_b.c", "a.b_c", "a.b.c"))
class NamesThatFlattenAlike(nn.Module):
    """`a.b_c`, `a_b.c` and `a.b.c` are three layers."""

    def __init__(self):
        super().__init__()
        self.a, self.a_b = nn.Module(), nn.Module()
        self.a.b = nn.Module()
        self.a_b.c, self.a.b_c, self.a.b.c = (nn.Linear(W, W) for _ in range(3))

    def forward(self, x):
        return self.a.b.c(torch.relu(self.a.b_c(torch.relu(self.a_b.c(x)))))


class _Deep(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.module = _Deep(depth - 1) if depth else nn.Linear(W, W)

    def forward(self, x):
        return self.module(x) + x


@awkward()
def one_name_at_every_level():
    """`module.module.module`."""
    return _Deep(4)


@awkward()
class Model(nn.Module):
    """A class called like the graph's own, with a name of its own for the root."""

    def __init__(self):
        super().__init__()
        self.name, self.root, self.fc = "model", nn.Linear(W, W), nn.Linear(W, W)

    def _get_name(self):
        return "graph module!"

    def forward(self, x):
        return self.fc(torch.relu(self.root(x)))
