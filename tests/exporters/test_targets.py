"""What `quantize(..., target=format)` makes is never refused by `export(format=...)`."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.config.targets import TARGETS
from fxquant.numerics.quantized_weight import QuantizedWeight
from fxquant.numerics.weights import quantize_weight, with_exact_scales
from tests.exporters.layers import quantized_layers

QUIET = {"accuracy_warning": "ignore"}


class Awkward(nn.Module):
    """Layers of many shapes, some without a bias, some with rows that are nearly zero."""

    def __init__(self):
        super().__init__()
        self.even = nn.Linear(64, 64, bias=False)
        self.narrow = nn.Linear(64, 96)
        self.uneven = nn.Linear(96, 44)  # outputs that fill no word
        self.short = nn.Linear(44, 64, bias=False)  # groups of 32 do not divide its inputs
        self.tiny = nn.Linear(64, 64)
        with torch.no_grad():
            self.tiny.weight[:8] *= 1e-6
            self.narrow.weight[3] = 1e-9

    def forward(self, x):
        for layer in (self.even, self.narrow, self.uneven, self.short, self.tiny):
            x = layer(x).relu()
        return x


def data():
    return [torch.randn(64, 64) + 0.5]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["rtn", "hqq", "best", "awq+gptq"])
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_refused_afterwards(target, method, symmetric):
    if not (symmetric or TARGETS[target].has_zero_points):
        symmetric = True
    options = {"group_size": 32, "skip_param_threshold": 0, "method": method, **QUIET}
    graph, info = fxquant.quantize(
        Awkward().eval(), data(), target=target, symmetric=symmetric, **options
    )
    assert [f for f in fxquant.check_export(graph, target) if f.is_loss] == []
    assert {"even", "narrow", "tiny"} <= quantized_layers(graph).keys()
    assert info.sqnr_db > 10
    assert info.config.zero_points == "integer"
    new_biases = graph.get_submodule("even").bias is not None
    assert new_biases == TARGETS[target].adds_biases


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "awq"])
def test_layers_that_a_format_cannot_hold_stay_float_and_say_why(target):
    options = {"group_size": 32, "skip_param_threshold": 0, "target": target, **QUIET}
    _, info = fxquant.quantize(Awkward().eval(), **options)
    row = next(d for d in info.decisions if d.module == "short")
    assert (row.action, row.rule) == ("float", f"target: {target}")
    assert "groups of 32 do not divide its 44 inputs" in row.reason
    row = next(d for d in info.decisions if d.module == "uneven")
    assert row.action == ("int4" if target == "compressed-tensors" else "float")


def test_a_layer_too_narrow_for_a_group_gets_no_width_that_the_format_lacks():
    def narrow(target):
        _, info = fxquant.quantize(Awkward().eval(), target=target, group_size=80, **QUIET)
        return next(d for d in info.decisions if d.module == "tiny")

    assert narrow("compressed-tensors").action == "int8"
    assert narrow("awq").action == "float"
    assert "no 8 bits, only 4" in narrow("awq").reason


def test_bits_are_allocated_among_those_of_the_format():
    options = {"group_size": 32, "skip_param_threshold": 0, "average_bits": 8.0, **QUIET}
    graph, info = fxquant.quantize(Awkward().eval(), data(), target="awq", **options)
    assert set(info.config.bits.values()) <= {4, 16}
    assert fxquant.check_export(graph, "awq") == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target": "gtpq"}, "Did you mean 'gptq'"),
        ({"target": "awq", "bits": {"a": 8}}, "got 8 for the target 'awq'"),
        ({"target": "gptq", "bits": 3}, "one of 4, 8"),
        ({"target": "gptq", "activation_bits": 8}, "float activations"),
        ({"zero_points": "whole"}, "zero_points.*'whole'.*float.*integer"),
    ],
)
def test_a_config_refuses_what_a_target_cannot_hold_at_all(options, text):
    with pytest.raises(fxquant.OptionError, match=text):
        fxquant.QuantConfig(**options)


def test_scales_too_fine_for_float16_become_the_nearest_ones_it_has():
    weight = torch.randn(4, 64) * torch.tensor([1.0, 1e-5, 1e-7, 1e-30])[:, None]
    made = quantize_weight(weight, 4, 32)
    found = with_exact_scales(made, weight, torch.float16)
    assert torch.equal(found.scales, found.scales.half().float())
    assert torch.equal(found.scales, found.scales.bfloat16().float())
    assert torch.equal(found.dequantize()[0], made.dequantize()[0])
    assert (found.dequantize() - weight).abs()[1:].max() < 1e-5 / 4
    assert with_exact_scales(made, weight, torch.bfloat16) is made


def test_scales_beyond_the_range_are_left_for_the_export_to_refuse():
    weight = torch.randn(2, 32) * 1e8
    made = quantize_weight(weight, 4, 32)
    assert isinstance(found := with_exact_scales(made, weight, torch.float16), QuantizedWeight)
    assert torch.equal(found.scales, made.scales)
