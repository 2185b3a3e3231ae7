"""A function of one linear layer times another, as one call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.modules.gated_linear import GatedLinear


class Gated(nn.Module):
    """Two layers that read one value, and what a test makes of them."""

    def __init__(self, use, gate=96, up=96, **options):
        super().__init__()
        self.gate, self.up = nn.Linear(64, gate, **options), nn.Linear(64, up, **options)
        self.use = use

    def forward(self, x):
        return self.use(self, x)


def both(model, x, **options):
    """The plain and the fused graph of a model, whose outputs were compared."""
    options = {"group_size": 32, "accuracy_warning": "ignore", **options}
    plain, _ = fxquant.quantize(model.eval(), example_inputs=x, **options)
    fused = fxquant.fuse(plain)
    with torch.no_grad():
        expected, found = plain(x.clone()), fused(x.clone())
        assert torch.equal(expected, found) or fxquant.sqnr_db(expected, found) > 100
    return plain, fused


def gates(gm):
    return [m.function for m in gm.modules() if isinstance(m, GatedLinear)]


FUSED = {
    "silu": lambda m, x: F.silu(m.gate(x)) * m.up(x),
    "gelu": lambda m, x: m.up(x) * F.gelu(m.gate(x)),
    "gelu_tanh": lambda m, x: F.gelu(m.gate(x), approximate="tanh") * m.up(x),
    "relu": lambda m, x: torch.mul(m.up(x), m.gate(x).relu()),
}


@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"activation_bits": 8}, {"symmetric": False}])
@pytest.mark.parametrize("name", FUSED)
def test_products_with_a_function(name, options):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64)
    plain, fused = both(Gated(FUSED[name]), x, **options)
    assert gates(fused) == [name]
    assert fxquant.info(fused).fused == {"gate": 1}
    assert fxquant.diff(plain, fused).changes


def test_files_and_other_dtypes(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    plain, fused = both(Gated(FUSED["silu"], bias=False), x)
    fxquant.save_model(fused, tmp_path / "fused.safetensors")
    loaded = fxquant.load_model(tmp_path / "fused.safetensors")
    assert torch.equal(loaded(x), fused(x))
    expected = plain(x)
    half = fused.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert fxquant.sqnr_db(expected, half.float()) > 40


def write_in_between(model, x):
    gate = model.gate(x)
    x.mul_(2)
    return F.silu(gate) * model.up(x)


LEFT_ALONE = {
    "no function": Gated(lambda m, x: m.gate(x) * m.up(x)),
    "another value": Gated(lambda m, x: F.silu(m.gate(x)) * m.up(x + 1)),
    "read twice": Gated(lambda m, x: (lambda y: F.silu(m.gate(x)) * y + y)(m.up(x))),
    "a value written in between": Gated(write_in_between),
    "other sizes": Gated(lambda m, x: F.silu(m.gate(x)) * m.up(x), gate=1, up=96),
    "no whole blocks": Gated(lambda m, x: F.silu(m.gate(x)) * m.up(x), gate=40, up=40),
    "one layer": Gated(lambda m, x: (lambda y: F.silu(y) * y)(m.gate(x))),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_products_that_are_left_alone(name):
    torch.manual_seed(0)
    _, fused = both(LEFT_ALONE[name], torch.randn(2, 5, 64))
    assert gates(fused) == []
