"""Products with parameters that belong to no layer, or that a layer is not called for."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.awkward.registry import W, awkward, rows


def sequence_first(batch, length):
    """One tensor [length, batch, W]."""
    return (torch.randn(length, batch, W),)


def matrix(*shape):
    return nn.Parameter(torch.randn(*shape) / 8)


@awkward(layers=("qkv", "out"), own=False)
class BiasComputedInForward(nn.Module):
    """`F.linear` of a layer's weight with a bias put together on the way, as BEiT has it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(W, 3 * W, bias=False), nn.Linear(3 * W, W)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(W)), nn.Parameter(torch.randn(W))
        self.register_buffer("k_bias", torch.zeros(W))

    def forward(self, x):
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        return self.out(F.linear(x, self.qkv.weight, bias))


class Functional(nn.Module):
    """Two bare matrices; each subclass multiplies in its own way."""

    def __init__(self):
        super().__init__()
        self.a, self.b = matrix(96, W), matrix(W, 96)


BARE = {"layers": ("a", "b"), "own": False}


@awkward(**BARE)
class LinearByKeywords(Functional):
    """`F.linear(input=..., weight=...)`."""

    def forward(self, x):
        h = F.linear(input=x, weight=self.a)
        return F.linear(torch.relu(h), bias=None, weight=self.b)


@awkward(**BARE)
class MatmulTransposed(Functional):
    """`x @ w.T` and `torch.matmul(x, w.mT)`."""

    def forward(self, x):
        return torch.matmul(torch.relu(x @ self.a.T), self.b.mT)


@awkward(**BARE)
class MatmulPlain(Functional):
    """`x @ w` and `x.matmul(w)`."""

    def forward(self, x):
        return torch.relu(x @ self.b).matmul(self.a)


@awkward(**BARE, inputs=rows)
class MmAndAddmm(Functional):
    """`torch.mm` and `torch.addmm` with a constant, beta and alpha."""

    def forward(self, x):
        h = torch.relu(torch.mm(x, self.b))
        return torch.addmm(torch.ones(W), h, self.a, beta=0.5, alpha=2)


@awkward(**BARE, int4=())
class BmmAndBaddbmm(Functional):
    """`bmm` and `baddbmm` with an expanded parameter."""

    def forward(self, x):
        h = torch.bmm(x, self.b.expand(x.shape[0], -1, -1))
        a = self.a.unsqueeze(0).repeat(x.shape[0], 1, 1)
        return torch.baddbmm(torch.ones(1, 1, 1), torch.relu(h), a)


@awkward(**BARE)
class EinsumBothWays(Functional):
    """`einsum` with the weight as it is, and transposed."""

    def forward(self, x):
        h = torch.einsum("bnc,oc->bno", x, self.a)
        return torch.einsum("...i,oi->...o", torch.relu(h), self.b)


@awkward(**BARE)
class EinsumPlain(Functional):
    """`einsum` with the weight first, and in other letters."""

    def forward(self, x):
        h = torch.einsum("ik,bni->bnk", self.b, x)
        return torch.einsum("b n k, k i -> b n i", torch.relu(h), self.a)


@awkward(**BARE, int4=())
class WeightFromTheLeft(Functional):
    """`w @ x.transpose(1, 2)`."""

    def forward(self, x):
        h = torch.relu(self.a @ x.transpose(1, 2))
        return (self.b @ h).transpose(1, 2)


@awkward(**BARE, int4=())
class TensordotAndInner(Functional):
    """`tensordot` and `inner`."""

    def forward(self, x):
        return torch.inner(torch.relu(torch.tensordot(x, self.a, dims=([2], [1]))), self.b)


@awkward(layers=("packed", "head"), own=False)
class ChunksOfAParameter(nn.Module):
    """One parameter holds three weights, taken by chunk."""

    def __init__(self):
        super().__init__()
        self.packed, self.head = matrix(3 * W, W), nn.Linear(W, W)

    def forward(self, x):
        q, k, v = (F.linear(x, part) for part in self.packed.chunk(3))
        return self.head((q @ k.transpose(1, 2) / 8).softmax(-1) @ v)


@awkward(layers=("qkv", "head"), int4=("head",), own=False)
class SlicesOfALayer(nn.Module):
    """Slices of a layer's weight and bias are used one by one."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(W, 2 * W), nn.Linear(W, W)

    def forward(self, x):
        a = F.linear(x, self.qkv.weight[:W], self.qkv.bias[:W])
        b = F.linear(x, self.qkv.weight[W:], self.qkv.bias[W:])
        return self.head(a * torch.sigmoid(b))


@awkward(layers=("q", "k", "head"), int4=("head",), own=False)
class JoinedWeights(nn.Module):
    """The weights of two layers are joined for one product."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.head = nn.Linear(W, W), nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x):
        weight = torch.cat((self.q.weight, self.k.weight))
        q, k = F.linear(x, weight, torch.cat((self.q.bias, self.k.bias))).chunk(2, -1)
        return self.head(torch.relu(q) * k)


@awkward(layers=("q", "k", "v", "out", "fc"), own=False, inputs=sequence_first)
class FunctionalAttention(nn.Module):
    """`F.multi_head_attention_forward` with the weights of Linear layers."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out, self.fc = (nn.Linear(W, W) for _ in range(5))

    def forward(self, x):
        y, _ = F.multi_head_attention_forward(
            x, x, x, W, 4, torch.empty(0), torch.cat((self.q.bias, self.k.bias, self.v.bias)),
            None, None, False, 0.0, self.out.weight, self.out.bias, False, None, False, None,
            use_separate_proj_weight=True, q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
        )  # fmt: skip
        return self.fc(y)


@awkward(layers=("packed", "out"), own=False, inputs=sequence_first)
class FunctionalAttentionPacked(nn.Module):
    """The same with one packed parameter."""

    def __init__(self):
        super().__init__()
        self.packed, self.out = matrix(3 * W, W), nn.Linear(W, W)

    def forward(self, x):
        return F.multi_head_attention_forward(
            x, x, x, W, 4, self.packed, None, None, None, False, 0.0, self.out.weight,
            self.out.bias, False, need_weights=False,
        )[0]  # fmt: skip


@awkward(layers=("fc", "head"), int4=("head",), own=False)
class CalledAndRead(nn.Module):
    """A layer is called, and its weight is used again, transposed."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x):
        return self.head(F.linear(torch.relu(self.fc(x)), self.fc.weight.t()))


@awkward(layers=("fc", "head"), own=False)
class OnlyRead(nn.Module):
    """A layer that is never called: its weight and bias are used."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x):
        return self.head(torch.relu(x @ self.fc.weight.T + self.fc.bias))


@awkward(layers=("a", "b"), own=False)
class CastAndScaled(Functional):
    """The weight goes through a cast, a scale and a view."""

    def forward(self, x):
        h = F.linear(x, self.a.to(x.dtype))
        return F.linear(torch.relu(h), self.b.float().contiguous().view(W, 96))


@awkward(layers=("weights.0", "weights.1", "named.head"), own=False)
class ParameterContainers(nn.Module):
    """Weights in a ParameterList and a ParameterDict."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([matrix(W, W), matrix(W, W)])
        self.named = nn.ParameterDict({"head": matrix(W, W)})

    def forward(self, x):
        for weight in self.weights:
            x = torch.relu(F.linear(x, weight))
        return x @ self.named["head"]


@awkward(layers=("head",))
class WeightsThatAreNoParameters(nn.Module):
    """A buffer, and a tensor that is a plain attribute, are weights."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frozen", torch.randn(W, W) / 8)
        self.plain = torch.randn(W, W) / 8
        self.head = nn.Linear(W, W)

    def forward(self, x):
        return self.head(torch.relu(F.linear(F.linear(x, self.frozen), self.plain)))


@awkward(layers=("head",), own=False)
class FusedExperts(nn.Module):
    """Experts in one three-dimensional parameter, chosen softly."""

    def __init__(self):
        super().__init__()
        self.experts, self.gate = matrix(4, W, W), nn.Linear(W, 4)
        self.head = nn.Linear(W, W)

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        each = torch.einsum("bnc,eco->bneo", x, self.experts)
        return self.head((weights[..., None] * each).sum(2))


@awkward(layers=("head",), inputs=lambda b, n: (torch.randn(b, n, W),))
class Recurrent(nn.Module):
    """An LSTM and a GRU before a layer."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(W, 32, batch_first=True), nn.GRU(32, W, batch_first=True)
        self.head = nn.Linear(W, W)

    def forward(self, x):
        return self.head(self.gru(self.lstm(x)[0])[0])


@awkward(layers=("head",), int4=("head",))
class Bilinear(nn.Module):
    """A bilinear layer, and a convolution of width one."""

    def __init__(self):
        super().__init__()
        self.bilinear, self.conv = nn.Bilinear(W, W, W), nn.Conv1d(W, W, 1)
        self.head = nn.Linear(W, W)

    def forward(self, x):
        h = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.bilinear(x, h) / 8)


@awkward(layers=("a", "b"), own=False)
class OneFlatParameter(nn.Module):
    """Weights are views of one flat buffer, as sharded training leaves them."""

    def __init__(self):
        super().__init__()
        self.flat = torch.randn(2 * W * W) / 8
        self.a = nn.Parameter(self.flat[: W * W].view(W, W))
        self.b = nn.Parameter(self.flat[W * W :].view(W, W))

    def forward(self, x):
        return F.linear(torch.relu(F.linear(x, self.a)), self.b)


@awkward(layers=("model",), own=False, int4=("model",))
class BareRoot(nn.Module):
    """The model is one product with its own weight."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = matrix(W, W), nn.Parameter(torch.randn(W))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@awkward(layers=("layers.0", "head"), int4=("head",), own=False)
class EncoderLayers(nn.Module):
    """torch's own transformer layers."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(W, 4, 96, batch_first=True)
        self.layers = nn.ModuleList([layer])
        self.head = nn.Linear(W, W)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
