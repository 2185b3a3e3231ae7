import pytest
import torch
from torch import nn

import fxquant
from fxquant.config.quant_config import QuantConfig
from fxquant.demo.language_model import calibration_tokens, heldout_tokens, load_language_model
from fxquant.errors import OptionError
from fxquant.graph.calls import Call
from fxquant.passes.decide import decide
from fxquant.passes.quantize_sequentially import quantize_sequentially
from tests import models
from tests.fitters import KeepingFitter
from tests.models import WIDTH

X = [torch.randn(16, 5, WIDTH), torch.randn(7, 5, WIDTH)]
QUIET = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}
# What layers read while others are fitted is compared with what the result computes.
pytestmark = pytest.mark.usefixtures("float32_products")


def seen_moments(model):
    """The moments each layer is given, with plain rounding in every layer."""
    gm = fxquant.trace(model, X[0])
    fitter = KeepingFitter()
    decisions = decide(gm, QuantConfig(group_size=32, skip_param_threshold=0))
    calls = [Call((x,)) for x in X]
    return gm, quantize_sequentially(gm, decisions, calls, fitter), fitter.seen


def test_each_layer_sees_what_the_quantized_layers_before_it_produce():
    gm, q, seen = seen_moments(models.Plain().eval())
    with torch.no_grad():
        noisy = torch.cat([nn.functional.gelu(q.norm(q.first(x))) for x in X]).flatten(0, 1)
        clean = torch.cat([nn.functional.gelu(gm.norm(gm.first(x))) for x in X]).flatten(0, 1)
    moments = seen["second"]
    assert moments.tokens == 23 * 5
    assert torch.allclose(moments.hessian, noisy.T @ noisy, rtol=1e-4, atol=1e-3)
    shift = (clean - noisy) @ gm.second.weight.T
    assert torch.allclose(moments.cross.sum(0), shift.T @ noisy, rtol=1e-3, atol=1e-3)
    assert torch.allclose(moments.total_shift, shift.double().sum(0), atol=1e-3)
    assert seen["first"].cross.abs().max() == 0


def test_the_error_of_a_residual_is_part_of_the_shift():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.drop = nn.Dropout(0.1)

        def forward(self, x):
            x = self.first(x)
            return x + self.drop(self.second(x.relu()))

    gm, q, seen = seen_moments(Residual().eval())
    with torch.no_grad():
        noisy = torch.cat([q.first(x) for x in X]).flatten(0, 1)
        clean = torch.cat([gm.first(x) for x in X]).flatten(0, 1)
        shift = gm.second(clean.relu()) - gm.second(noisy.relu()) + clean - noisy
    moments = seen["second"]
    assert torch.allclose(moments.total_shift, shift.double().sum(0), atol=1e-3)
    assert torch.allclose(moments.cross.sum(0), shift.T @ noisy.relu(), rtol=1e-3, atol=1e-3)


def test_layers_in_opaque_modules_and_shared_layers_are_reached():
    model = models.BranchInChild().eval()
    if model.child.fc(X[0]).sum() <= 0:
        model.child.fc.weight.data.neg_()
        model.child.fc.bias.data.neg_()
    _, q, seen = seen_moments(model)
    assert set(seen) == {"child.fc", "child.block.0", "child.block.2", "head"}
    assert seen["child.fc"].tokens == seen["head"].tokens == 23 * 5
    assert torch.isfinite(q(X[0])).all()
    _, _, seen = seen_moments(models.CalledTwice().eval())
    assert seen["fc"].tokens == 2 * 23 * 5  # of all its calls


class OneAfterTheOther(nn.Module):
    """Opaque, and what its second layer reads lies where the first one's input was."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.memory = bytearray(4 * 16 * 5 * WIDTH)

    def place(self, x):
        placed = torch.frombuffer(self.memory, dtype=torch.float32, count=x.numel())
        return placed.view(x.shape).copy_(x)

    def forward(self, x):
        y = self.first(self.place(x))
        if y.abs().max() > 1e9:
            return y
        return self.second(self.place(y.relu()))


def test_inputs_that_follow_each_other_in_the_same_memory_are_not_one():
    _, q, seen = seen_moments(OneAfterTheOther().eval())
    quantized = {name.rpartition(".")[2]: module for name, module in q.named_modules()}
    (moments,) = (m for name, m in seen.items() if name.endswith("second"))
    with torch.no_grad():
        noisy = torch.cat([quantized["first"](x).relu() for x in X]).flatten(0, 1)
    assert torch.allclose(moments.hessian, noisy.T @ noisy, rtol=1e-4, atol=1e-3)


def test_a_layer_without_tokens_is_rounded_and_the_ledger_says_so():
    class Unreached(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)
            self.rare = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            x = self.fc(x)
            return self.rare(x) if x.abs().max() > 1e9 else x

    _, info = fxquant.static_quantize(Unreached(), X, method="gptq", **QUIET)
    reasons = {d.module: d.reason for d in info.decisions}
    assert "no calibration token reached it" in reasons["rare"]
    assert "no calibration token" not in reasons["fc"]


def test_fitting_closes_much_of_the_gap_of_rounding_on_unseen_text():
    model, heldout = load_language_model(), heldout_tokens()[::16]
    figures = {}
    for method in ("rtn", "auto"):
        q, info = fxquant.static_quantize(
            model, calibration_tokens()[::8].split(16), method=method, num_calibration_samples=32,
            accuracy_warning="ignore",
        )  # fmt: skip
        with torch.no_grad():
            figures[info.method] = fxquant.sqnr_db(model(heldout), q(heldout))
    assert figures["gptq"] > figures["rtn"] + 1.5


def test_gptq_needs_data():
    with pytest.raises(OptionError, match="without calibration data.*method='rtn'"):
        fxquant.quantize(models.Plain(), method="gptq")


def test_a_padding_mask_among_the_arguments_is_used():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, attention_mask):
            return self.fc(x) * attention_mask[..., None]

    mask = torch.ones(16, 5, dtype=torch.long)
    mask[:, 3:] = 0
    call = Call((), {"x": X[0], "attention_mask": mask})
    gm = fxquant.trace(Masked(), call.kwargs)
    fitter = KeepingFitter()
    decisions = decide(gm, QuantConfig(group_size=32, skip_param_threshold=0))
    quantize_sequentially(gm, decisions, [call], fitter)
    assert fitter.seen["fc"].tokens == 16 * 3
