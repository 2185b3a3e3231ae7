import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import OptionError
from fxquant.swap import LeftFloatWarning
from tests import models
from tests.models import WIDTH

X = torch.randn(3, 5, WIDTH)
QUIET = {"group_size": 32, "accuracy_warning": "ignore"}


def test_the_users_class_computes_what_the_graph_computes(tmp_path):
    model = models.Plain().eval()
    q, info = fxquant.static_quantize(model, [X], **QUIET)
    swapped = fxquant.swap_modules(model, q)
    assert type(swapped) is models.Plain
    assert torch.equal(swapped(X), q(X))
    assert type(model.first) is torch.nn.Linear
    fxquant.save_model(q, tmp_path / "m.safetensors", info)
    other = models.Plain().eval()
    assert fxquant.load_into(other, tmp_path / "m.safetensors") is other
    assert torch.equal(other(X), q(X))  # biases and norms came along


def test_layers_without_a_module_are_listed_as_float():
    model = models.CrossAttention().eval()
    q, _ = fxquant.static_quantize(model, [(X, X)], **QUIET)
    with pytest.warns(LeftFloatWarning, match="in_proj_q"):
        swapped = fxquant.swap_modules(model, q)
    assert swapped.fxquant_left_float == [f"attention.in_proj_{n}" for n in "qkv"]


def test_another_model_is_refused_and_left_as_it_was(tmp_path):
    q, _ = fxquant.static_quantize(models.Plain(), [X], **QUIET)
    fxquant.save_model(q, tmp_path / "m.safetensors")
    other = torch.nn.Module()
    other.first = torch.nn.Linear(WIDTH, 32)
    with pytest.raises(OptionError, match="first.*same class and configuration"):
        fxquant.load_into(other, tmp_path / "m.safetensors")
    assert type(other.first) is torch.nn.Linear


def test_a_scale_folded_into_a_layer_that_stays_float_is_an_error():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            with torch.no_grad():  # values with outlier channels
                self.attention.in_proj_weight[128::8] *= 40

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(8, 6, 64)
    q, info = fxquant.static_quantize(
        model, [x], method="awq+hqq", group_size=32, skip_param_threshold=0,
        accuracy_warning="ignore",
    )  # fmt: skip
    assert info.folded_scales
    with pytest.raises(OptionError, match="scale folded into .*without awq"):
        fxquant.swap_modules(model, q)
