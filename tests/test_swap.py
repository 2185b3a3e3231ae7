import pytest
import torch

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
