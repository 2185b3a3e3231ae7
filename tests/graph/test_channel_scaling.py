import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.graph.calls import Call
from fxquant.graph.channel_scaling import ScalingFinder, apply_scale
from fxquant.graph.layers import sites
from fxquant.graph.scale_rules import CannotScaleError
from tests.graph.scales import random_scale

WIDTH, HEADS = 32, 4
X = torch.randn(2, 5, WIDTH)


class RmsNorm(nn.Module):
    """As plain ops, in the ways that models write it."""

    def __init__(self, offset=0.0):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.rand(WIDTH) + 0.5 - offset), offset

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.offset:
            return (normed * (self.offset + self.weight.float())).type_as(x)
        return self.weight * normed.to(x.dtype)


class Model(nn.Module):
    """Parts of transformers; `body` says how they are put together."""

    def __init__(self, body, norm=None):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if norm is None else norm
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.few = nn.Linear(WIDTH, WIDTH // 2)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.back = nn.Linear(WIDTH // 2, WIDTH)
        self.embedding = nn.Embedding(9, WIDTH)
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.drop, self.body = nn.Dropout(0.1), body

    def forward(self, x):
        return self.body(self, x)


def heads(x, count=HEADS):
    return x.view(2, 5, count, -1).transpose(1, 2)


def merged(x):
    return x.transpose(1, 2).reshape(2, 5, -1)


def attention(m, x):
    scores = heads(m.a(x)) @ heads(m.b(x)).transpose(-1, -2)
    return m.c(merged(scores.softmax(-1) @ heads(m.wide(x).chunk(2, -1)[1])))


def grouped_attention(m, x):
    value = heads(m.few(x), HEADS // 2)[:, :, None].expand(2, HEADS // 2, 2, 5, 8)
    query, key = heads(m.a(x)), heads(m.b(x))
    return m.c(merged(F.scaled_dot_product_attention(query, key, value.reshape(2, HEADS, 5, 8))))


def native_grouped_attention(m, x):
    query, key = heads(m.a(x)), heads(m.few(x), HEADS // 2)
    value = heads(m.few(x) * 1.0, HEADS // 2)
    return m.c(merged(F.scaled_dot_product_attention(query, key, value, enable_gqa=True)))


def gated(m, x):
    gate, up = m.wide(x).chunk(2, -1)
    return m.c(F.silu(gate) * up)


# How the input of layer `c` (or the one named) is made, and what the scale is folded into.
FOLDED = {
    "layer norm": (lambda m, x: m.c(m.norm(x)), None, ["norm"]),
    "shared by three": (lambda m, x: m.a(h := m.norm(x)) + m.b(h) + m.c(h), None, ["norm"]),
    "norm without bias": (lambda m, x: m.c(m.norm(x)), nn.LayerNorm(WIDTH, bias=False), ["norm"]),
    "rms norm module": (lambda m, x: m.c(m.norm(x)), nn.RMSNorm(WIDTH), ["norm"]),
    "rms norm as ops": (lambda m, x: m.c(m.norm(x)), RmsNorm(), ["norm.weight"]),
    "one plus weight": (lambda m, x: m.c(m.norm(x)), RmsNorm(1.0), ["norm.weight"]),
    "functional norm": (
        lambda m, x: m.c(F.layer_norm(x, (WIDTH,), m.gain, m.norm.bias)),
        None,
        ["gain", "norm.bias"],
    ),
    "previous linear": (lambda m, x: m.c(m.a(x)), None, ["a"]),
    "relu and dropout": (lambda m, x: m.c(m.drop(F.relu(m.a(x)))), None, ["a"]),
    "product": (lambda m, x: m.c(F.gelu(m.b(x)) * m.a(x)), None, ["a"]),
    "one side of a product": (lambda m, x: m.c(m.a(x) * F.gelu(m.b(x))), None, ["a"]),
    "gain": (lambda m, x: m.c(torch.tanh(x) * m.gain), None, ["gain"]),
    "quotient": (lambda m, x: m.c(m.a(x) / (1 + x.abs().sum(-1, keepdim=True))), None, ["a"]),
    "sum": (lambda m, x: m.c(m.a(x) + m.b(x)), None, ["a", "b"]),
    "embedding": (lambda m, x: m.c(m.embedding(x.argmax(-1) % 9)), None, ["embedding"]),
    "view": (lambda m, x: m.c(m.norm(x).view(-1, WIDTH)), None, ["norm"]),
    "heads": (lambda m, x: m.c(merged(heads(m.a(x)))), None, ["a"]),
    "attention": (attention, None, ["wide"]),
    "fused gate": (gated, None, ["wide"]),
    "grouped attention": (grouped_attention, None, ["few"]),
    "sizes are read": (
        lambda m, x: m.c((h := m.norm(x)).view(h.size(0), -1, WIDTH)),
        None,
        ["norm"],
    ),
}
REFUSED = {
    "input": (lambda m, x: m.c(x), "input of the model"),
    "post-norm residual": (
        lambda m, x: m.norm(m.c(h := m.norm(x)) + h),
        "LayerNorm|several places",
    ),
    "residual": (lambda m, x: m.c(h := m.a(x)) + h, "add"),
    "gelu": (lambda m, x: m.c(F.gelu(m.a(x))), "gelu"),
    "softmax": (lambda m, x: m.c(m.a(x).softmax(-1)), "softmax"),
    "constant added": (lambda m, x: m.c(m.a(x) + 1), "add"),
    "square": (lambda m, x: m.c((h := m.a(x)) * h), "mul"),
    "output": (lambda m, x: (m.c(h := m.norm(x)), h), "output"),
    "shared producer": (lambda m, x: m.c(m.a(x)) + m.a(x * 2), "several places"),
    "reader called twice": (lambda m, x: m.c(m.c(m.norm(x))), "several places"),
    "another reader": (lambda m, x: m.c(h := m.a(x)) + torch.sigmoid(h), "sigmoid"),
    "one token of a norm": (
        lambda m, x: m.c(F.layer_norm(x, (WIDTH,), m.gain, m.norm.bias)[:, 0]),
        "differs between tokens",
    ),
    "not affine": (lambda m, x: m.c(F.layer_norm(x, (WIDTH,))), "layer_norm"),
    "channels mixed with tokens": (
        lambda m, x: m.c(m.a(x).transpose(1, 2).reshape(2, 5, WIDTH)),
        "Linear a has no weight for the scale",
    ),
    "key of attention": (native_grouped_attention, "several places|place"),
}


def traced(body, norm=None):
    model = Model(body, copy.deepcopy(norm)).eval()
    for parameter in model.norm.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return copy.deepcopy(fxquant.trace(model, X))


def input_of(gm, name="c"):
    return next(s.node.args[0] for s in sites(gm) if s.name == name)


@pytest.mark.parametrize(("body", "norm", "producers"), FOLDED.values(), ids=FOLDED)
def test_a_folded_scale_changes_the_input_but_not_the_output(body, norm, producers):
    gm = traced(body, norm)
    scaling = ScalingFinder(gm, Call((X,))).find(input_of(gm))
    assert scaling.producers == producers
    seen = []
    gm.c.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        before = gm(X)
        scale = random_scale(scaling)
        apply_scale(scaling, scale)
        after = gm(X)
    assert fxquant.sqnr_db(before, after) > 110
    channel = next(c for name, _, c in scaling.readers if name == "c")
    assert torch.allclose(seen[0], seen[1] * scale[channel], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[0], seen[1], rtol=1e-2)


@pytest.mark.parametrize(("body", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_folded_is_refused_with_the_reason(body, reason):
    gm = traced(body)
    with pytest.raises(CannotScaleError, match=reason):
        ScalingFinder(gm, Call((X,))).find(input_of(gm))


def test_heads_that_share_a_value_share_its_scale():
    gm = traced(grouped_attention)
    scaling = ScalingFinder(gm, Call((X,))).find(input_of(gm))
    assert int(scaling.group_of.max()) + 1 == WIDTH // 2
    groups = scaling.group_of.view(HEADS // 2, 2, 8)
    assert torch.equal(groups[:, 0], groups[:, 1])


def test_a_tied_weight_is_left_alone():
    model = Model(lambda m, x: m.c(m.norm(x)) @ m.embedding.weight.T[:, :9]).eval()
    model.embedding.weight = model.c.weight
    gm = fxquant.trace(model, X)
    with pytest.raises(CannotScaleError, match="several places"):
        ScalingFinder(gm, Call((X,))).find(input_of(gm))
