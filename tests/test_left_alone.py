"""The user's model, data and process after every call: in success, in error, and after Ctrl-C."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader

import fxquant
from fxquant.errors import CalibrationError, FxquantError, WeightError
from tests.awkward import CASES
from tests.awkward.attributes import Base
from tests.awkward.linears import Clamping
from tests.awkward.registry import Two, W
from tests.awkward.weights import LoraLinear
from tests.compare import assert_same, worst_sqnr
from tests.fingerprint import unchanged

QUIET = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}

# Without inputs, quantizing says that nothing was verified; graphs of odd models may warn too.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def static(**options):
    return lambda model, data: fxquant.static_quantize(model, data, **QUIET, **options)


def sensitivity(method):
    return lambda model, data: fxquant.sensitivity(
        model, data, method=method, group_size=32, skip_param_threshold=0
    )


WITHOUT_DATA = {
    "plan": lambda model, data: fxquant.plan(model),
    "trace": lambda model, data: fxquant.trace(model),
    "quantize": lambda model, data: fxquant.quantize(model, **QUIET),
}
WITH_DATA = {
    "plan on an example": lambda model, data: fxquant.plan(model, example_inputs=data[0]),
    "trace on an example": lambda model, data: fxquant.trace(model, data[0]),
    "quantize on an example": lambda model, data: fxquant.quantize(
        model, example_inputs=data[0], **QUIET
    ),
    "rtn": static(method="rtn"),
    "gptq": static(method="gptq"),
    "activations": static(method="rtn", activation_bits=8),
    "dynamic activations": static(method="rtn", activation_bits=8, observer="dynamic"),
    "scaled": static(method="awq+rtn"),
    "local": sensitivity("local"),
    "exact": sensitivity("exact"),
    "gradient": sensitivity("gradient"),
}
CALLS = {**WITHOUT_DATA, **WITH_DATA}
FEW = ("plan", "trace on an example", "quantize", "rtn", "gptq", "activations", "local")

# One of each kind; the other models are looked at in test_awkward_models.py.
SUBJECTS = (
    "spectral_norm", "old_weight_norm", "stale_spectral_norm", "pruned", "lora_that_merges",
    "FusesOnEval", "first_layer_is_Clamping", "hook_that_records", "patched_by_partial",
    "OnTheInput", "IntoANestedInput", "OutputDependsOnTheCount", "AppendsToACache",
    "UpdatesABuffer", "GrowsItsTables", "MakesALayerOnTheFirstCall", "HandsACacheToAChild",
    "SamplesALatent", "AlwaysDrops", "with_gradients", "mixed_flags", "TrainReturnsNone",
    "EncoderLayers", "opaque_in_opaque_in_opaque", "TiedByFunction", "compiled",
)  # fmt: skip

FUSE = {"armed": False, "left": 0, "error": KeyboardInterrupt}


def burn():
    """Count a forward, and raise when the fuse has burnt down."""
    if FUSE["armed"]:
        FUSE["left"] -= 1
        if FUSE["left"] == 0:
            raise FUSE["error"]("the fuse has burnt down")


@contextlib.contextmanager
def fuse(length, error):
    """Raise `error` in the forward of number `length`; gives the number of forwards that ran."""
    FUSE.update(armed=True, left=length, error=error)
    ran = []
    try:
        yield ran
    finally:
        FUSE["armed"] = False
        ran.append(length - FUSE["left"])


class Burning(nn.Module):
    """A child in the middle of everything."""

    def forward(self, x):
        burn()
        return x


class Kitchen(nn.Module):
    """Whatever can be disturbed, in one model, with the fuse in its middle."""

    def __init__(self):
        super().__init__()
        self.spectral = parametrizations.spectral_norm(nn.Linear(W, W))
        self.lora, self.clamping = LoraLinear(W, W), Clamping(W, W)
        self.block, self.burning = Two(), Burning()
        self.attention = nn.TransformerEncoderLayer(W, 4, W, batch_first=True)
        self.norm, self.drop = nn.BatchNorm1d(W), nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(()))
        self.calls, self.cache, self.seen = 0, {}, []
        self.block.register_forward_hook(lambda m, args, y: self.seen.append(y))
        self.hidden = [nn.Linear(W, W)]
        self.norm.eval()
        self.attention.linear1.requires_grad_(False)

    def forward(self, x):
        if x.shape[1] == 7:
            raise ValueError("no seven positions")
        self.calls += 1
        self.steps += 1
        x.mul_(0.5)
        h = self.drop(self.clamping(self.lora(self.spectral(x))))
        h = h + 0.01 * torch.randn_like(h)
        h = self.burning(h + self.block(h))
        h = self.norm(h.transpose(1, 2)).transpose(1, 2)
        self.cache[h.shape[1]] = h
        if h.mean() > -1e9:
            h = F.relu(self.attention(h), inplace=True)
        return self.burning(self.hidden[0](h))


def kitchen():
    torch.manual_seed(0)
    model = Kitchen()
    model(torch.randn(2, 3, W)).square().mean().backward()
    return model


def batches(*lengths):
    torch.manual_seed(1)
    return [(torch.randn(3, length, W),) for length in lengths]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_call_that_succeeds_changes_nothing(subject, call):
    case = CASES[subject]
    model, data = case.model(), [case.call(), case.call()]
    with unchanged(model, data):
        assert CALLS[call](model, data) is not None


@pytest.mark.parametrize("call", CALLS)
def test_a_model_with_everything_is_left_alone_also_by_an_interrupt_in_any_forward(call):
    model, data = kitchen(), batches(5, 5)
    with unchanged(model, data), fuse(10**9, KeyboardInterrupt) as ran:
        assert CALLS[call](model, data) is not None
    forwards = ran[0]
    # Without inputs the model is not run, and tracing gives up before it comes to this child.
    assert forwards or call in ("plan", "trace", "quantize"), "the call does not look at forward"
    for length in sorted({1, 2, (forwards + 1) // 2, forwards} & set(range(1, forwards + 1))):
        model, data = kitchen(), batches(5, 5)
        with (
            fuse(length, KeyboardInterrupt),
            unchanged(model, data),
            pytest.raises(KeyboardInterrupt, match="the fuse has burnt down"),
        ):
            CALLS[call](model, data)


@pytest.mark.parametrize("call", CALLS)
def test_an_error_in_a_forward_changes_nothing(call):
    model, data = kitchen(), batches(5, 5)
    with fuse(1, MemoryError), unchanged(model, data):
        try:
            result = CALLS[call](model, data)
        except (FxquantError, MemoryError) as error:
            assert "the fuse has burnt down" in f"{error} {error.__cause__}"
        else:
            assert result is not None  # a way of tracing failed, another one worked


@pytest.mark.parametrize("call", ["rtn", "gptq", "activations", "scaled", "local", "exact"])
def test_a_model_that_raises_on_the_second_batch_is_left_alone(call):
    model, data = kitchen(), batches(5, 7, 5)
    with unchanged(model, data):
        with pytest.raises((FxquantError, ValueError)) as caught:
            CALLS[call](model, data)
        assert "seven" in f"{caught.value} {caught.value.__cause__}" or "7" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "nonsense"}, {"bits": 7}, {"group_size": -2}, {"activation_bits": 3},
        {"observer": "nobody"}, {"modules_to_not_convert": ["no.such.layer"]},
        {"accuracy_warning": "shout"}, {"num_calibration_samples": 0},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_change_nothing(options):
    model, data = kitchen(), batches(5)
    with unchanged(model, data), pytest.raises(FxquantError, match=str(next(iter(options)))):
        fxquant.static_quantize(model, data, **{**QUIET, **options})


@pytest.mark.parametrize("call", ["rtn", "gptq", "activations", "local", "exact", "gradient"])
def test_data_that_is_not_finite_is_refused_and_changes_nothing(call):
    model, data = CASES["spectral_norm"].model(), batches(5, 5)
    data[1][0][0, 0, 0] = float("nan")
    with unchanged(model, data), pytest.raises(CalibrationError, match="(?i)nan|finite"):
        CALLS[call](model, data)


@pytest.mark.parametrize("call", ["rtn", "gptq", "activations", "local", "exact", "gradient"])
@pytest.mark.parametrize("data", [[], ["text"], [{"no": torch.ones(1)}], [5], [None]], ids=str)
def test_data_of_no_use_is_refused_and_changes_nothing(call, data):
    model = kitchen()
    with unchanged(model, data), pytest.raises(FxquantError):
        CALLS[call](model, data)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("call", ["rtn", "gptq", "activations", "local"])
def test_data_that_raises_midway_changes_nothing(call, error):
    def loader():
        yield batches(5)[0]
        raise error("the disk is gone")

    model = CASES["spectral_norm"].model()
    with unchanged(model), pytest.raises((error, FxquantError)) as caught:
        CALLS[call](model, loader())
    assert "the disk is gone" in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize("call", ["rtn", "gptq", "activations", "local"])
def test_a_loader_that_shuffles_draws_from_no_state_of_the_callers(call):
    torch.manual_seed(0)
    model = Base()
    loader = DataLoader(list(torch.randn(8, 5, W)), batch_size=2, shuffle=True)
    with unchanged(model):
        assert CALLS[call](model, loader) is not None


@pytest.mark.parametrize("call", ["plan", "quantize", "rtn", "gptq", "local"])
def test_a_weight_that_is_not_finite_is_named_and_left_alone(call):
    torch.manual_seed(0)
    model, data = Base(), batches(5)
    model.second.weight.data[3, 4] = float("nan")
    with unchanged(model, data):
        if call == "plan":
            assert CALLS[call](model, data) is not None
            return
        with pytest.raises(WeightError, match=r"second.*(?i:nan|finite)"):
            CALLS[call](model, data)


def quantized(subject):
    case = CASES[subject]
    model, data = case.model(), [case.call(), case.call()]
    q, info = fxquant.static_quantize(model, data, method="rtn", **QUIET)
    return model, q, info


@pytest.mark.parametrize("subject", SUBJECTS)
def test_swapping_saving_and_dequantizing_change_nothing(subject, tmp_path):
    model, q, info = quantized(subject)
    with unchanged(model), unchanged(q):
        swapped = fxquant.swap_modules(model, q)
        assert swapped is not model
        assert fxquant.dequantize_model(q) is not q
        with contextlib.suppress(FxquantError):  # some hold modules that must be named to save
            fxquant.save_model(q, tmp_path / "m.safetensors", info)
    with unchanged(model):
        swapped.bfloat16()
        q.double()
        for parameter in (*swapped.parameters(), *q.parameters()):
            parameter.data.zero_()


@pytest.mark.parametrize("subject", ["spectral_norm", "first_layer_is_Renamed", "mixed_flags"])
def test_training_the_model_on_does_not_change_what_was_quantized(subject):
    model, q, _ = quantized(subject)
    swapped = fxquant.swap_modules(model, q).eval()
    inputs = CASES[subject].call()
    with torch.no_grad():
        before, swapped_before = q(*inputs), swapped(*inputs)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.add_(1)
        assert_same(q(*inputs), before, bits=True)
        assert_same(swapped(*inputs), swapped_before, bits=True)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.parametrize("call", FEW)
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_surroundings_stay_as_they_are_and_do_not_change_the_result(surroundings, call):
    torch.manual_seed(0)
    model, data = Two().eval(), batches(5, 5)
    with torch.no_grad():
        expected = model(*data[0])
    with SURROUNDINGS[surroundings](), unchanged(model, data):
        result = CALLS[call](model, data)
    graph = result[0] if isinstance(result, tuple) else result
    if isinstance(graph, torch.fx.GraphModule):
        with torch.no_grad():
            found = graph(*data[0])
        assert found.dtype == torch.float32
        assert not found.is_inference()
        assert worst_sqnr(expected, found) > 12
        dtypes = {p.dtype for p in graph.parameters() if p.is_floating_point()}
        assert dtypes <= {torch.float32}


FRESH = """
import os, sys, warnings
import torch
from torch import nn
import fxquant
before = dict(os.environ), list(warnings.filters)
layer, x = nn.Linear(64, 64), torch.randn(4, 5, 64)
class Checked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = layer
    def forward(self, x):
        if x.shape[1] > 99:
            raise ValueError
        return self.fc(x)
fxquant.static_quantize(Checked(), [x], group_size=32, accuracy_warning="ignore")
assert "sympy" in sys.modules, "nothing was imported that leaves something"
assert (dict(os.environ), list(warnings.filters)) == before
"""


def test_the_first_call_in_a_process_leaves_its_environment_and_filters_alone():
    command = [sys.executable, "-W", "ignore", "-c", FRESH]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_as_many_modules_as_there_are_may_write_in_place():
    model = nn.Sequential(nn.Linear(W, W), *(nn.ReLU(inplace=True) for _ in range(300)))
    data = [torch.randn(4, W)]
    with unchanged(model, data):
        _, info = fxquant.static_quantize(model, data, method="rtn", **QUIET)
    assert info.selected_layers == ["0"]
