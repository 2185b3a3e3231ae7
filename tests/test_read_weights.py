"""Weights that other code than their layer's multiplies with: packed in the graph and in a copy."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.errors import OptionError
from fxquant.modules.packed_parameter import PackedParameter
from fxquant.modules.packed_tensor import PackedTensor

X = torch.randn(4, 7, 64)
OPTIONS = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}
pytestmark = pytest.mark.usefixtures("float32_products")


class ComputesABias(nn.Module):
    """As vision transformers do whose keys have no bias."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(64, 192, bias=False), nn.Linear(64, 64)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(64))

    def forward(self, x):
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        q, k, v = F.linear(x, weight=self.qkv.weight, bias=bias).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class HandsWeightsOn(nn.Module):
    """As attention in windows does: a function gets the weights and the biases."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        return attend(x, self.qkv.weight, self.qkv.bias, self.proj.weight, self.proj.bias)


def attend(x, weight, bias, out_weight, out_bias):
    q, k, v = F.linear(x, weight, bias).chunk(3, -1)
    return F.linear(F.scaled_dot_product_attention(q, k, v), out_weight, out_bias)


class HasBareWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.up_bias = (
            nn.Parameter(torch.randn(128, 64) / 8),
            nn.Parameter(torch.ones(128)),
        )
        self.down = nn.Parameter(torch.randn(128, 64) / 11)

    def forward(self, x):
        return F.gelu(F.linear(x, self.up, self.up_bias)) @ self.down


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)

    def forward(self, x):
        return self.layer(self.attention(x, x, x, need_weights=False)[0])


PACKED = {ComputesABias: 1, HandsWeightsOn: 2, HasBareWeights: 2, Attends: 2}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("kind", PACKED)
def test_a_copy_multiplies_with_the_integers_and_adds_its_own_bias(kind, method):
    torch.manual_seed(0)
    model = kind().eval()
    q, _ = fxquant.static_quantize(model, [X, torch.randn_like(X)], method=method, **OPTIONS)
    swapped = fxquant.swap_modules(model, q)
    assert swapped.fxquant_left_float == []
    packed = [m for m in swapped.modules() if isinstance(m, PackedParameter)]
    assert len(packed) == PACKED[kind]
    assert all(m.bias is None for m in packed)
    torch.testing.assert_close(swapped(X), q(X), rtol=1e-5, atol=1e-5)
    for other in (copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped))):
        assert torch.equal(other(X), swapped(X))
    x = X.clone().requires_grad_()
    swapped(x).sum().backward()
    assert x.grad.abs().sum() > 0


class AttendsAlongTheFirst(nn.Module):
    """Attention over the first dimension, then over the second."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4)
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)

    def forward(self, x):
        own = self.attention(x, x, x, need_weights=False)[0]
        return self.layer(own.transpose(0, 1))


@pytest.mark.parametrize("kind", [Attends, AttendsAlongTheFirst])
@pytest.mark.parametrize("bits", [4, 8])
def test_attention_of_torchs_multiplies_all_its_weights_as_integers(kind, bits, monkeypatch):
    torch.manual_seed(0)
    model = kind().eval()
    data = [X, torch.randn_like(X)]
    q, _ = fxquant.static_quantize(model, data, bits=bits, method="gptq", **OPTIONS)
    swapped = fxquant.swap_modules(model, q)
    monkeypatch.setattr(PackedTensor, "materialize", None)  # nothing may need the values
    with torch.no_grad():  # scores may be summed in another order
        torch.testing.assert_close(swapped(X), q(X), rtol=1e-5, atol=1e-5)


def test_a_scale_folded_into_what_a_packed_projection_reads_is_in_the_copy_too():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True).eval()
    wide = X * torch.linspace(0.1, 4, 64)
    options = {**OPTIONS, "modules_to_not_convert": ["self_attn.out_proj"]}  # which values feed
    q, info = fxquant.static_quantize(model, [wide, wide.roll(1, 0)], method="awq", **options)
    assert any("self_attn.in_proj" in folded.readers for folded in info.folded_scales)
    swapped = fxquant.swap_modules(model, q)
    with torch.no_grad():
        torch.testing.assert_close(swapped(wide), q(wide), rtol=1e-5, atol=1e-5)


def test_a_scale_folded_into_a_bias_that_the_model_keeps_is_refused():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True).eval()
    wide = X * torch.linspace(0.1, 4, 64)
    q, info = fxquant.static_quantize(
        model, [wide, wide.roll(1, 0)], method="smoothquant", **OPTIONS
    )
    assert any("self_attn.in_proj" in folded.producers for folded in info.folded_scales)
    with pytest.raises(OptionError, match="a channel scale folded into self_attn.in_proj"):
        fxquant.swap_modules(model, q)


class Calls(nn.Module):
    """Calls a layer, and multiplies with its weight besides."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.out(self.fc(x) + F.linear(x, self.fc.weight, self.out.bias))


class AttendsTwice(nn.Module):
    """Multiplies with all of the packed projection, and with its parts."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x):
        own = self.attention(x, x, x, need_weights=False)[0]
        return self.attention(own, x, x, need_weights=False)[0]


@pytest.mark.filterwarnings("ignore::fxquant.swap.LeftFloatWarning")
@pytest.mark.parametrize("kind", [Calls, AttendsTwice])
def test_a_weight_that_several_layers_of_the_graph_have_stays_float_in_a_copy(kind):
    torch.manual_seed(0)
    model = kind().eval()
    q, _ = fxquant.static_quantize(model, [X], method="rtn", **OPTIONS)
    swapped = fxquant.swap_modules(model, q)
    assert swapped.fxquant_left_float
    assert not any(isinstance(m, PackedParameter) for m in swapped.modules())
    error = (swapped(X) - model(X)).square().sum() / model(X).square().sum()
    assert 0 < error < 0.01  # what is float is near, what is quantized is not the same


class NormsAProduct(nn.Module):
    def __init__(self, has_bias):
        super().__init__()
        self.table = nn.Parameter(torch.randn(128, 64) / 8)
        self.bias = nn.Parameter(torch.randn(128)) if has_bias else None
        self.norm, self.out = nn.BatchNorm1d(128), nn.Linear(128, 64)

    def forward(self, x):
        return self.out(self.norm(F.linear(x, self.table, self.bias)).relu())


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_norm_behind_such_a_product_stays_a_norm(has_bias):
    torch.manual_seed(0)
    model, x = NormsAProduct(has_bias).eval(), torch.randn(64, 64)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    q, info = fxquant.static_quantize(model, [x], method="rtn", **OPTIONS)
    assert not info.folded_norms
    torch.testing.assert_close(fxquant.swap_modules(model, q)(x), q(x), rtol=1e-5, atol=1e-5)
