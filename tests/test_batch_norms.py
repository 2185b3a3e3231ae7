"""Norms that are folded into the layers before them, against the user's own model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.config.quant_config import QuantConfig
from fxquant.graph.calls import Call
from fxquant.numerics.metrics import sqnr_db
from fxquant.passes.decide import decide
from fxquant.passes.fold_norms import FoldedNorm, fold_norms
from fxquant.tracing.trace import graph_of

OPTIONS = {"skip_param_threshold": 0, "accuracy_warning": "ignore", "bits": 8, "method": "rtn"}
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv_norm(inputs, outputs, kernel, **options):
    """As torchvision's models have it: no bias, since the norm has one."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ResNetLike(nn.Module):
    """A stem, a block with a shortcut of its own, and a norm behind a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.relu = conv_norm(3, 8, 3), nn.ReLU(inplace=True)
        self.one, self.two = conv_norm(8, 12, 3, stride=2), conv_norm(12, 12, 3)
        self.short = conv_norm(8, 12, 1, stride=2)
        self.head, self.norm = nn.Linear(12, 5), nn.BatchNorm1d(5, affine=False)

    def forward(self, x):
        x = self.relu(self.stem(x))
        x = self.relu(self.two(self.relu(self.one(x))) + self.short(x))
        return self.norm(self.head(x.mean((2, 3))))


class OwnNorm(nn.BatchNorm2d):
    """A norm with an activation, in code of its own, as timm's are."""

    def forward(self, x):
        assert x.ndim == 4
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
            self.momentum, self.eps,
        )  # fmt: skip
        return F.hardswish(x)


class MobileNetLike(nn.Module):
    """An inverted block with a depthwise convolution, and norms in the user's own code."""

    def __init__(self):
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(3, 16, 1), OwnNorm(16, eps=1e-3)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, bias=False, dilation=2)
        self.norm2, self.project = OwnNorm(16), nn.Conv2d(16, 6, 1, bias=False)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("variance", torch.ones(6))

    def forward(self, x):
        x = self.norm2(self.depthwise(self.norm1(self.expand(x))))
        return F.batch_norm(self.project(x), self.mean, self.variance)


class Upward(nn.Module):
    """Transposed convolutions, with groups and without, and one and three dimensions of space."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(3, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)
        self.grouped, self.norm2 = nn.ConvTranspose2d(6, 8, 2, groups=2), nn.BatchNorm2d(8)
        self.line, self.norm3 = nn.Conv1d(8, 8, 3, groups=2), nn.BatchNorm1d(8)
        self.volume, self.norm4 = nn.Conv3d(8, 4, 1), nn.BatchNorm3d(4)

    def forward(self, x):
        x = self.norm2(self.grouped(F.relu(self.norm(self.up(x)))))
        x = self.norm3(self.line(x.flatten(2)))
        return self.norm4(self.volume(x[..., None, None]))


class OneForAll(nn.Module):
    """A layer and its norm, called twice together."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(F.relu(self.norm(self.conv(x)))))


FOLDED = {ResNetLike: 5, MobileNetLike: 3, Upward: 4, OneForAll: 1}


def made(cls, dtype=torch.float32):
    """A model with statistics and weights of a norm that are nothing special."""
    torch.manual_seed(1)
    model = cls().eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2) if "var" in name else tensor.data.normal_(0.3, 1)
    return model.to(dtype)


def norms_in(gm):
    kinds = (gm.get_submodule(n.target) if n.op == "call_module" else n.target
             for n in gm.graph.nodes)  # fmt: skip
    return [k for k in kinds if k is F.batch_norm or isinstance(k, nn.modules.batchnorm._BatchNorm)]


def folded(model, x, **options):
    gm = graph_of(model, Call.of(x))
    config = QuantConfig(skip_param_threshold=0, bits=8, **options)
    return gm, fold_norms(gm, decide(gm, config))


@pytest.mark.parametrize("cls", FOLDED)
def test_the_folded_graph_computes_what_the_model_computes(cls):
    model, x = made(cls, torch.float64), X.double()
    before = copy.deepcopy(model.state_dict())
    _, result = folded(model, x)
    assert len(result.folded) == FOLDED[cls]
    assert not norms_in(result.gm)
    torch.testing.assert_close(result.gm(x), model(x), rtol=1e-11, atol=1e-11)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("cls", "dtype"),
    [(cls, torch.float32) for cls in FOLDED]
    + [(MobileNetLike, dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)],
)
def test_copies_of_the_users_class_and_files_compute_what_the_graph_does(cls, dtype, tmp_path):
    model, x = made(cls, dtype), X.to(dtype)
    before = copy.deepcopy(model.state_dict())
    q, info = fxquant.quantize(model, [x], **OPTIONS)
    assert not norms_in(q)
    expected, got = model(x), q(x)
    assert sqnr_db(expected, got) > 30
    held_out = slice(-info.heldout_samples, None)
    assert info.sqnr_db == pytest.approx(sqnr_db(expected[held_out], got[held_out]), abs=0.1)
    fxquant.save_model(q, tmp_path / "m.safetensors", info)
    others = {
        "loaded": fxquant.load_model(tmp_path / "m.safetensors"),
        "swapped": fxquant.swap_modules(model, q),
        "into": fxquant.quantize(model, [x], into="model", **OPTIONS)[0],
        "load_into": fxquant.load_into(cls().eval().to(dtype), tmp_path / "m.safetensors"),
    }
    for name, other in others.items():
        assert torch.equal(other(x), got), name
    assert others["swapped"].state_dict().keys() > {
        name for fold in info.folded_norms for name in fold.tensors.values()
    }
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Kept(nn.Module):
    """A convolution and a norm that subclasses use in ways that forbid folding."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.other = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.norm(self.conv(x))


class ReadTwice(Kept):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class TwoLayersOneNorm(Kept):
    def forward(self, x):
        return self.norm(self.other(F.relu(self.norm(self.conv(x)))))


class OneLayerTwoNorms(Kept):
    def __init__(self):
        super().__init__()
        self.second = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.second(self.conv(x.flip(-1)))


class TiedWeight(Kept):
    def __init__(self):
        super().__init__()
        self.other.weight = self.conv.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x):
        return self.other(self.norm(self.conv(F.pad(x, (0, 0, 0, 0, 0, 5)))))


class BatchStatistics(Kept):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)


class TrainingFunction(Kept):
    def forward(self, x):
        return F.batch_norm(self.conv(x), None, None, training=True)


class StatisticsReadElsewhere(Kept):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm.running_mean[:, None, None]


class Hooked(Kept):
    def __init__(self):
        super().__init__()
        self.conv.register_forward_hook(lambda module, args, output: output.abs())


class ChannelsElsewhere(Kept):
    """A norm of the eight tokens of a linear layer with eight outputs."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(self.fc(x[:, 0]))


class WideEpsilon(Kept):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8, eps=2.0)


class NotFinite(Kept):
    def forward(self, x):
        return F.batch_norm(self.conv(x), torch.zeros(8), torch.full((8,), -1.0)).nan_to_num()


@pytest.mark.parametrize("cls", Kept.__subclasses__())
def test_what_cannot_be_folded_stays_as_it_is(cls):
    model = made(cls)
    gm, result = folded(model, X)
    assert result.folded == ()
    assert len(norms_in(result.gm)) == len(norms_in(gm))
    assert torch.equal(result.gm(X), model(X))


@pytest.mark.parametrize("kept", ["conv", "norm"])
def test_what_the_caller_names_stays_apart(kept):
    _, result = folded(made(Kept), X, modules_to_not_convert=[kept])
    assert len(norms_in(result.gm)) == 1


def test_a_function_is_folded_only_where_the_rank_of_its_input_is_known():
    model = made(MobileNetLike)
    assert norms_in(fxquant.quantize(model, **OPTIONS)[0])
    assert not norms_in(fxquant.quantize(model, example_inputs=X, **OPTIONS)[0])
    assert not norms_in(fxquant.quantize(made(OneForAll), **OPTIONS)[0])  # its class tells


def test_a_model_in_training_mode_is_folded_as_in_evaluation_mode_and_left_as_it_is():
    model = made(ResNetLike).train()
    before = copy.deepcopy(model.state_dict())
    q, _ = fxquant.quantize(model, [X], **OPTIONS)
    assert model.norm.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sqnr_db(model.eval()(X), q(X)) > 30


def test_the_record_and_the_differences_name_folded_norms():
    model = made(Kept)
    q, info = fxquant.quantize(model, [X], **OPTIONS)
    rows = {d.module: d for d in info.decisions}
    assert rows["conv"].reason.endswith("BatchNorm norm folded in")
    assert (rows["norm"].rule, rows["norm"].reason) == ("folded", "folded into conv")
    names = {role: f"norm.{role}" for role in ("running_mean", "running_var", "weight", "bias")}
    assert info.folded_norms == [FoldedNorm("norm", "conv", names, 1e-5)]
    assert type(info).from_dict(info.to_dict()) == info
    changes = {c.node: c for c in fxquant.diff(fxquant.trace(model, X), q).changes}
    assert (changes["norm"].status, changes["norm"].rule) == ("removed", "folded")
    assert changes["conv"].weight_sqnr_db == info.rows[0].weight_sqnr_db > 40


def test_a_files_size_is_known_with_norms_folded_and_without():
    report = fxquant.sensitivity(
        made(ResNetLike), [X], method="gradient", rounding="rtn", skip_param_threshold=0,
        group_size=8,
    )  # fmt: skip
    for bits in ({"head": 8}, {"stem.0": 8, "one.0": 4, "two.0": 16, "short.0": 8, "head": 16}):
        known = {row.module: row.saved_bytes for row in report.rows}
        expected = report.other_bytes + sum(known[m][bits.get(m, 16)] for m in known)
        options = {**OPTIONS, "bits": bits, "group_size": 8}
        _, info = fxquant.quantize(made(ResNetLike), [X], **options)
        assert info.quantized_size_mb == pytest.approx(expected / 1e6, abs=1e-9)


def test_statistics_of_norms_that_stay_come_from_the_file(tmp_path):
    model = made(Kept)
    q, info = fxquant.quantize(model, [X], modules_to_not_convert=["norm"], **OPTIONS)
    fxquant.save_model(q, tmp_path / "m.safetensors", info)
    assert torch.equal(fxquant.load_into(Kept().eval(), tmp_path / "m.safetensors")(X), q(X))
