"""Convolutions on integers with what stands around them, against the graph before `fuse`."""

import copy
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.errors import OptionError
from fxquant.fusion.fused import fused_counts
from fxquant.kernels.extension import NOT_BUILT
from fxquant.kernels.pooling import max_pool
from fxquant.modules.activation import dequantize_activation, quantize_activation
from fxquant.modules.conv import QuantizedConv

pytestmark = pytest.mark.skipif(NOT_BUILT is not None, reason="the extension is not built here")
FLOOR_DB = 40  # a level more or less in one layer's integers
CHANNELS = 12


class Uses(nn.Module):
    """Convolutions, and what a test makes of them; the output does not show how they lie."""

    def __init__(self, use, stem=None):
        super().__init__()
        self.stem = stem or nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1)
        self.one, self.two = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.point = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.act = nn.ReLU(inplace=True)
        self.nothing = nn.Identity()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.use = use

    def forward(self, x):
        return self.use(self, x).mean((-2, -1))


def both(use, stem=None, observer="minmax", size=(3, 16, 16)):
    """A quantized graph, and the same fused; their outputs were compared, and those of its file."""
    torch.manual_seed(0)
    x = torch.randn(2, *size)
    plain, _ = fxquant.quantize(
        Uses(use, stem).eval(), [x], bits=8, activation_bits=8, observer=observer,
        skip_param_threshold=0, accuracy_warning="ignore",
    )  # fmt: skip
    fused = fxquant.fuse(plain)
    with torch.no_grad():
        assert fxquant.sqnr_db(plain(x), fused(x)) > FLOOR_DB
        with TemporaryDirectory() as folder:
            fxquant.save_model(fused, f"{folder}/fused")
            assert torch.equal(fxquant.load_model(f"{folder}/fused")(x), fused(x))
    return plain, fused, x


def calls(gm, target):
    return [node.target for node in gm.graph.nodes].count(target)


def convolutions(gm):
    """The nodes that call convolutions, by their target."""
    return {
        str(node.target): node
        for node in gm.graph.nodes
        if node.op == "call_module" and isinstance(gm.get_submodule(node.target), QuantizedConv)
    }


def residual(self, x):
    y = self.act(self.stem(x))
    z = self.two(self.nothing(self.act(self.one(y))))
    z += y
    return self.act(z)


def test_integers_go_from_layer_to_layer():
    _, fused, _ = both(
        lambda self, x: self.act(self.two(self.act(self.one(self.act(self.stem(x))))))
    )
    found = convolutions(fused)
    assert calls(fused, quantize_activation) == 1  # of the input
    assert calls(fused, dequantize_activation) == 0
    assert [node.kwargs.get("with_floats") for node in found.values()] == [False, False, None]
    assert {node.kwargs["function"] for node in found.values()} == {"relu"}
    assert fused_counts(fused)["convolution"] == 3


def test_a_residual_is_added_inside_and_kept_in_floats():
    _, fused, _ = both(residual)
    found = convolutions(fused)
    assert found["stem"].kwargs["with_floats"] is True
    assert found["one"].kwargs["with_floats"] is False
    assert found["two"].kwargs["residual"].args == (found["stem"], 0)
    assert calls(fused, quantize_activation) == 1


@pytest.mark.parametrize(
    "add", [lambda a, b: a + b, lambda a, b: b + a, torch.add], ids=["left", "right", "function"]
)
def test_every_way_to_add_is_one(add):
    _, fused, _ = both(lambda self, x: (lambda y: F.relu(add(self.two(y), self.point(y))))(
        self.act(self.stem(x))))  # fmt: skip
    assert fused_counts(fused)["convolution"] == 3
    assert not any(node.target in (torch.add,) for node in fused.graph.nodes)


def test_an_operand_of_another_shape_is_added_as_torch_does():
    both(lambda self, x: F.relu(self.one(self.act(self.stem(x))) + x.mean((1, 2, 3), keepdim=True)))


def test_an_operand_of_another_dtype_and_a_number_are_added_as_torch_does():
    for other in (lambda y: y.double(), lambda y: y.shape[0]):

        def use(self, x, other=other):
            y = self.act(self.stem(x))
            return self.two(F.relu(self.one(y) + other(y)).float())

        plain, fused, x = both(use)
        assert fused(x).dtype == plain(x).dtype


def test_what_writes_into_another_value_stays():
    def use(self, x):
        y = self.act(self.stem(x))
        kept = y * 1
        kept += self.one(y)  # writes into `kept`, not into the convolution's output
        return self.two(y) + kept

    both(use)


def test_a_residual_that_is_written_later_is_read_before():
    def use(self, x):
        y = self.act(self.stem(x))
        other = y * 1
        z = self.one(y) + other
        other.mul_(100)
        return F.relu(z) + other

    both(use)


def test_pooling_is_our_own():
    _, fused, _ = both(lambda self, x: self.one(self.pool(self.act(self.stem(x)))))
    assert calls(fused, max_pool) == 1
    _, fused, _ = both(lambda self, x: self.one(F.max_pool2d(self.act(self.stem(x)), 2)))
    assert calls(fused, max_pool) == 1


def test_dynamic_grids_fuse_too():
    _, fused, _ = both(residual, observer="dynamic")
    found = convolutions(fused)
    assert found["two"].kwargs["function"] == "relu"
    assert "residual" in found["two"].kwargs


def test_layers_that_the_kernel_does_not_have_stay():
    for stem in (
        nn.Conv2d(3, CHANNELS, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, CHANNELS, 3, groups=3),
    ):
        _, fused, _ = both(lambda self, x: self.one(self.act(self.stem(x))), stem)
        assert not convolutions(fused)["stem"].kwargs
        assert convolutions(fused)["one"].kwargs


def test_an_output_stays_where_torch_would_lay_it():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    plain, _ = fxquant.quantize(model, [x], bits=8, activation_bits=8, accuracy_warning="ignore")
    fused = fxquant.fuse(plain)
    assert fused(x).stride() == plain(x).stride()


def test_one_sample_and_other_sizes_and_dtypes():
    plain, fused, _ = both(residual)
    with torch.no_grad():
        for x in (torch.randn(3, 3, 16, 16), torch.randn(1, 3, 9, 13)):
            assert fxquant.sqnr_db(plain(x), fused(x)) > FLOOR_DB
            half = copy.deepcopy(fused).bfloat16()(x.bfloat16())
            assert half.dtype == torch.bfloat16
            assert fxquant.sqnr_db(plain(x), half.float()) > 20


def test_a_gradient_that_integers_would_lose_is_refused():
    plain, fused, x = both(residual)
    given = x.clone().requires_grad_()
    with pytest.raises(OptionError, match=r"requires a gradient.*the graph that fuse was given"):
        fused(given)
    plain(given).sum().backward()
    assert given.grad.abs().max() > 0
    with torch.no_grad():
        fused(given)


def test_dynamic_grids_pass_gradients_on():
    plain, fused, x = both(residual, observer="dynamic")
    gradients = []
    for gm in (plain, fused):
        given = x.clone().requires_grad_()
        gm(given).sum().backward()
        gradients.append(given.grad)
    assert fxquant.sqnr_db(*gradients) > FLOOR_DB


def test_it_is_exported():
    _, fused, x = both(residual)
    with torch.no_grad():
        expected = fused(x)
        exported = torch.export.export(fused, (x,)).module()
        assert fxquant.sqnr_db(expected, exported(x)) > FLOOR_DB


def test_a_new_weight_is_used_at_once():
    _, fused, x = both(residual)
    _, other, _ = both(residual)
    with torch.no_grad():
        before = fused(x)
        state = {k: -v if k.endswith("_weight_int8") else v for k, v in fused.state_dict().items()}
        fused.load_state_dict(state)
        assert not torch.equal(fused(x), before)
        assert torch.equal(other(x), before)
