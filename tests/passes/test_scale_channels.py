import pytest
import torch
from torch import nn

import fxquant
from fxquant.config.quant_config import QuantConfig
from fxquant.graph.calls import Call
from fxquant.graph.structures import main_output
from fxquant.measure.heldout import hold_out
from fxquant.passes.decide import decide
from fxquant.passes.observe_inputs import observe_inputs
from fxquant.passes.scale_channels import scale_channels
from fxquant.passes.simulate import SimulatedActivations, SimulatedWeights
from tests import zoo

WIDTH = 64
OPTIONS = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}


class Block(nn.Module):
    """A norm that makes outlier channels, and layers that read it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.norm.weight.data[::16] = 30.0
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        return self.out(torch.nn.functional.gelu(self.a(h) + self.b(h)))


X = list(torch.randn(48, 5, WIDTH, generator=torch.Generator().manual_seed(0)).split(16))
CALLS = [Call((x,)) for x in X]


def scaled(model, kinds, activations=None):
    gm = fxquant.trace(model.eval(), X[0])
    decisions = decide(gm, QuantConfig(group_size=32, skip_param_threshold=0))
    return gm, scale_channels(
        gm, decisions, CALLS, kinds, SimulatedWeights(QuantConfig(group_size=32)), activations
    )


@pytest.mark.parametrize("kind", ["awq", "smoothquant"])
def test_the_graph_computes_the_same_and_the_given_one_is_not_changed(kind):
    torch.manual_seed(0)
    model = Block()
    before = {name: p.clone() for name, p in model.named_parameters()}
    gm, result = scaled(model, [kind])
    with torch.no_grad():
        assert fxquant.sqnr_db(gm(X[0]), result.gm(X[0])) > 110
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert [f.producers for f in result.folded] == [("norm",)]
    assert result.folded[0].readers == ("a", "b")
    assert result.folded[0].gain_db > 0
    assert "folded into norm" in result.notes["a"]
    assert "gelu" in result.notes["out"]


def test_scaling_brings_the_output_nearer_to_the_float_one_on_unseen_data():
    torch.manual_seed(0)
    model, unseen = Block().eval(), torch.randn(64, 5, WIDTH)
    figures = {}
    for method in ("hqq", "awq+hqq"):  # hqq does not look at data itself
        q, info = fxquant.static_quantize(model, X, method=method, **OPTIONS)
        with torch.no_grad():
            figures[info.method] = fxquant.sqnr_db(model(unseen), q(unseen))
    assert figures["awq+hqq"] > figures["hqq"] + 1


def test_outliers_of_activations_move_into_the_weights():
    torch.manual_seed(0)
    gm, result = scaled(Block(), ["smoothquant"])
    before, after = (observe_inputs(g, ["a"], CALLS)["a"].largest for g in (gm, result.gm))
    assert after.max() / after.median() < 0.5 * before.max() / before.median()


def test_where_it_does_not_pay_nothing_is_scaled_and_the_ledger_says_so():
    torch.manual_seed(0)
    model = Block()
    model.norm.weight.data.fill_(1.0)
    for layer in (model.a, model.b):  # integers already: rounding costs nothing
        layer.weight.data = torch.randint(-7, 8, (WIDTH, WIDTH)).float()
        layer.weight.data[:, ::32] = -8
    gm, result = scaled(model, ["awq"])
    assert not result.folded
    assert "no scale is better" in result.notes["a"]
    assert torch.equal(gm(X[0]), result.gm(X[0]))


def per_tensor(x):
    step = x.abs().max() / 127
    return (x / step).round() * step


def test_the_rounding_of_activations_takes_part_in_the_search():
    """With nearly exact weights, only the rounding of activations makes scaling pay."""
    torch.manual_seed(0)
    model, exact = Block().eval(), SimulatedWeights(QuantConfig(group_size=32))
    gm = fxquant.trace(model, X[0])
    decisions = decide(gm, QuantConfig(bits=8, group_size=32, skip_param_threshold=0))
    gains = []
    for activations in (None, per_tensor):
        found = scale_channels(gm, decisions, CALLS, ["smoothquant"], exact, activations).folded
        gains.append(found[0].gain_db if found else 0)
    assert gains[1] > gains[0] + 3


def test_what_activations_are_rounded_to_is_what_the_graph_rounds_them_to():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval()
    q, _ = fxquant.static_quantize(model, [X[0]], activation_bits=8, **OPTIONS)
    fitted = hold_out([Call((X[0],))])[0][0].args[0]
    simulated = SimulatedActivations("minmax", 32)(fitted.flatten(0, 1)).view_as(fitted)
    layer = q.get_submodule("0")
    weights_only = fxquant.QuantizedLinearInt4(layer.quantized_weight, layer.bias)
    assert torch.allclose(q(fitted), weights_only(simulated), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "whisper"])
def test_real_architectures_are_scaled_saved_and_swapped(name, tmp_path):
    torch.manual_seed(0)
    entry = zoo.ZOO[name]
    model, call = entry.build().eval(), entry.inputs(4, 9)
    q, info = fxquant.static_quantize(model, [call], method="awq+smoothquant", **OPTIONS)
    reasons = {d.module: d.reason for d in info.decisions if d.action != "float"}
    assert reasons
    assert all("scale" in reason for reason in reasons.values())
    fxquant.save_model(q, tmp_path / "q.safetensors", info)
    with torch.no_grad():
        expected = q(**call)
        loaded = fxquant.load_model(tmp_path / "q.safetensors")(**call)
        swapped = fxquant.swap_modules(model, q)(**call)
    one, two, three = (main_output(v) for v in (expected, loaded, swapped))
    assert torch.equal(one, two)
    assert fxquant.sqnr_db(one, three) > 60
