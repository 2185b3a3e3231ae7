"""Convolutions from the graph to the file."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import WeightError
from fxquant.modules.conv import QuantizedConv


class Vision(nn.Module):
    """A stem, a grouped, a depthwise and a pointwise convolution, and a transposed one."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, stride=2, groups=4)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.point, self.up = nn.Conv2d(32, 48, 1), nn.ConvTranspose2d(48, 8, 2, stride=2)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x[:, :, ::2, ::2] + torch.relu(self.grouped(x))
        return self.up(torch.relu(self.point(torch.relu(self.depthwise(x)))))


def pictures():
    """Neighbours look alike, as in pictures: that is what fitting makes use of."""
    torch.manual_seed(0)
    mixing = torch.randn(3, 2)
    smooth = [torch.randn(6, 2, 16, 16).cumsum(-1).cumsum(-2) / 8 for _ in range(6)]
    return [torch.einsum("ck,bkhw->bchw", mixing, x) for x in smooth]


DATA = pictures()
LAYERS = {"stem", "grouped", "depthwise", "point", "up"}
OPTIONS = {"skip_param_threshold": 0, "accuracy_warning": "ignore"}


@pytest.mark.parametrize("group_size", [16, -1])
def test_gptq_on_patches_is_better_than_rounding(group_size, tmp_path):
    found = {}
    model = Vision().eval()
    for method in ("rtn", "gptq"):
        qmodel, info = fxquant.quantize(
            model, DATA, method=method, group_size=group_size, **OPTIONS
        )
        assert {d.module for d in info.decisions if d.bits == 4} >= LAYERS - {"depthwise"}
        found[method] = info.sqnr_db
    assert found["gptq"] > found["rtn"] + 3
    fxquant.save_model(qmodel, tmp_path / "m.safetensors", info)
    loaded = fxquant.load_model(tmp_path / "m.safetensors")
    assert isinstance(loaded.stem, QuantizedConv)
    swapped = fxquant.swap_modules(model, qmodel)
    for other in (loaded, swapped):
        assert torch.equal(other(DATA[0]), qmodel(DATA[0]))


def test_eight_bits_are_close_and_a_quarter_of_the_size():
    _, info = fxquant.quantize(Vision().eval(), DATA, bits=8, method="rtn", **OPTIONS)
    assert {d.module for d in info.decisions if d.action == "int8"} == LAYERS
    assert info.sqnr_db > 35
    assert info.compression_ratio > 3
    chosen = fxquant.plan(Vision().eval(), layer_types=[nn.ConvTranspose2d])
    assert chosen.selected_layers == ["up"]


@pytest.mark.parametrize("method", ["local", "gradient", "exact"])
def test_sensitivity_measures_convolutions(method):
    report = fxquant.sensitivity(
        Vision().eval(), DATA, method=method, rounding="rtn", group_size=16, skip_param_threshold=0
    )
    rows = {row.module: row for row in report.rows}
    assert set(rows) == LAYERS
    assert rows["point"].weight_sqnr_db > 16
    if method != "local":
        assert 5 < rows["point"].output_sqnr_db < 60


def test_a_convolution_with_infinite_weights_is_named():
    model = Vision().eval()
    model.grouped.weight.data[1, 2, 0, 0] = float("inf")
    with pytest.raises(WeightError, match=r"grouped\.weight.*1 of"):
        fxquant.quantize(model, DATA, **OPTIONS)


@pytest.mark.parametrize("observer", ["minmax", "dynamic"])
def test_activations_of_convolutions_are_rounded_and_the_record_says_how(observer, tmp_path):
    model = Vision().eval()
    options = {**OPTIONS, "bits": 8, "method": "rtn"}
    plain, _ = fxquant.quantize(model, DATA, **options)
    q, info = fxquant.quantize(model, DATA, activation_bits=8, observer=observer, **options)
    how = {d.module: d.reason.rsplit("; ", 1)[1] for d in info.decisions if d.bits}
    if observer == "minmax":
        assert set(how.values()) == {"static 8-bit activations, simulated"}
        scales = [b for name, b in q.named_buffers() if name.endswith("_scale")]
        assert [s.ndim for s in scales] == [0] * len(LAYERS)
        assert info.rows[0].input_high == max(x.max() for x in DATA[:5])
    else:
        for name in ("stem", "point"):
            assert how.pop(name) == "dynamic 8-bit activations, integers"
        assert set(how.values()) == {"dynamic 8-bit activations, simulated"}
        alone = torch.cat([q(DATA[0][i : i + 1]) for i in range(6)])
        torch.testing.assert_close(alone, q(DATA[0]), rtol=0, atol=1e-4)
        assert torch.equal(fxquant.swap_modules(model, q)(DATA[0]), q(DATA[0]))
    assert 25 < fxquant.sqnr_db(plain(DATA[0]), q(DATA[0])) < 60
    fxquant.save_model(q, tmp_path / "m.safetensors", info)
    assert torch.equal(fxquant.load_model(tmp_path / "m.safetensors")(DATA[0]), q(DATA[0]))


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(3, 4, 2, padding=1), nn.ConvTranspose2d(3, 4, 2), nn.Conv3d(3, 3, 1)]
)
def test_a_sample_is_rounded_to_255_levels_of_its_own(layer):
    """Against the float layer on inputs rounded here, with weights that 8 bits hold exactly."""
    dims, model = len(layer.kernel_size), nn.Sequential(layer)
    layer.weight.data = torch.randint(-127, 128, layer.weight.shape).float()
    layer.weight.data.flatten(1)[:, 0] = 127
    x = torch.randn(2, 3, *[4] * dims) * torch.tensor([1.0, 50.0]).view(2, *[1] * (dims + 1))
    q, _ = fxquant.quantize(model, activation_bits=8, **{**OPTIONS, "bits": 8, "method": "rtn"})
    if layer.kernel_size == (1, 1, 1):
        assert q.get_submodule("0").activation_arithmetic == "integers"
        return
    low, high = x.flatten(1).amin(1), x.flatten(1).amax(1)
    scale = ((high - low) / 254).view(2, *[1] * (dims + 1))
    zero = (-low.view_as(scale) / scale).round()
    rounded = ((x / scale + zero).round().clamp(0, 254) - zero) * scale
    torch.testing.assert_close(q(x), q.get_submodule("0").to_float()(rounded), rtol=1e-4, atol=1e-2)
    assert fxquant.sqnr_db(model(rounded), q(x)) > 40


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(64, 64, 3), nn.Conv1d(64, 64, 3, stride=2, bias=False)]
)
def test_a_convolution_whose_weight_is_computed_is_swapped(layer):
    torch.manual_seed(0)
    normed = torch.nn.utils.parametrizations.weight_norm(layer)
    model, x = nn.Sequential(normed, nn.ReLU(), nn.Conv1d(64, 64, 3)).eval(), torch.randn(4, 64, 20)
    q, _ = fxquant.static_quantize(model, [x, x], method="rtn", accuracy_warning="ignore")
    swapped = fxquant.swap_modules(model, q)
    assert swapped.fxquant_left_float == []
    with torch.no_grad():
        assert torch.equal(swapped(x), q(x))
    assert torch.nn.utils.parametrize.is_parametrized(model[0], "weight")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
def test_so_is_one_whose_weight_a_hook_computes(how):
    torch.manual_seed(0)
    model, x = nn.Sequential(how(nn.Conv1d(64, 64, 3)), nn.ReLU()).eval(), torch.randn(4, 64, 20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    q, _ = fxquant.static_quantize(model, [x, x], method="rtn", accuracy_warning="ignore")
    swapped = fxquant.swap_modules(model, q)
    assert swapped.fxquant_left_float == []
    with torch.no_grad():
        assert torch.equal(swapped(x), q(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
