"""The histogram observer by what it gains over min-max, in dB at 8 bits."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Exponential, Laplace, StudentT

from fxquant import HistogramObserver, create_observer, sqnr_db

COUNT = 50_000
DRAWS = {
    "normal": lambda: torch.randn(COUNT),
    "relu": lambda: torch.randn(COUNT).relu(),
    "N(5,1)": lambda: torch.randn(COUNT) + 5,
    "N(-5,1)": lambda: torch.randn(COUNT) - 5,
    "N(100,1)": lambda: torch.randn(COUNT) + 100,
    "tiny": lambda: torch.randn(COUNT) * 1e-6,
    "huge": lambda: torch.randn(COUNT) * 1e6,
    "gelu": lambda: F.gelu(torch.randn(COUNT)),
    "silu": lambda: F.silu(torch.randn(COUNT)),
    "softmax": lambda: (3 * torch.randn(COUNT // 50, 50)).softmax(-1),
    "uniform": lambda: torch.rand(COUNT),
    "exponential": lambda: Exponential(1.0).sample((COUNT,)),
    "laplace": lambda: Laplace(0.0, 1.0).sample((COUNT,)),
    "t5": lambda: StudentT(5.0).sample((COUNT,)),
    "t3": lambda: StudentT(3.0).sample((COUNT,)),
    "t2": lambda: StudentT(2.0).sample((COUNT,)),
    "lognormal": lambda: torch.randn(COUNT).exp(),
    "two points": lambda: torch.where(torch.rand(COUNT) < 0.5, 1.0, -3.0),
    "rare mode": lambda: torch.where(
        torch.rand(COUNT) < 0.01, torch.randn(COUNT) + 100, torch.randn(COUNT)
    ),
    "outlier channels": lambda: torch.where(
        torch.rand(COUNT) < 0.01, torch.randn(COUNT) * 60, torch.randn(COUNT)
    ),
    "few": lambda: torch.randn(20),
}


def fake_quantized(x, name, **options):
    observer = create_observer(name, **options)
    for part in x.chunk(7):
        observer(part)
    scale, zero_point = observer.calculate_qparams()
    low, high = observer.grid.integer.quant_min, observer.grid.integer.quant_max
    return ((x / scale + zero_point).round().clamp(low, high) - zero_point) * scale


def gain(x, keep=slice(None), name="histogram", **options):
    """How many dB better than min-max on the values to keep."""
    clipped, spanned = (fake_quantized(x, n, **o) for n, o in ((name, options), ("minmax", {})))
    return sqnr_db(x[keep], clipped[keep]) - sqnr_db(x[keep], spanned[keep])


@pytest.mark.parametrize("name", DRAWS)
def test_clipping_never_costs_a_decibel(name):
    assert gain(DRAWS[name]()) > -1.0


@pytest.mark.parametrize("value", [5.0, -2.0, 1e-20])
def test_a_constant_is_exact(value):
    x = torch.full((100,), value)
    assert torch.allclose(fake_quantized(x, "histogram"), x, rtol=1e-6)


def test_rare_values_near_the_others_are_no_outliers():
    x = torch.full((10_000,), 5.0)
    x[:10] = 7.0
    assert sqnr_db(x[:10], fake_quantized(x, "histogram")[:10]) > 40


def test_normal_data_keep_38_db():
    x = torch.randn(100_000)
    assert sqnr_db(x, fake_quantized(x, "histogram")) > 39.5


@pytest.mark.parametrize("shift", [0.0, 5.0])
@pytest.mark.parametrize(
    "outliers",
    [
        torch.full((5,), 100.0),
        torch.full((20,), 80.0),
        torch.tensor([1000.0]),
        torch.tensor([-100.0, 100.0]),
        torch.linspace(30, 90, 25),
    ],
    ids=["five", "twenty", "one", "both sides", "spread"],
)
def test_a_few_far_outliers_do_not_spoil_the_rest(outliers, shift):
    x = torch.randn(COUNT) + shift
    x[: len(outliers)] = outliers
    assert gain(x, keep=slice(len(outliers), None)) > 16
    symmetric = {"integer": "int8", "symmetric": True}
    assert gain(x, keep=slice(len(outliers), None), **symmetric) > 12


def test_outliers_of_activations_behind_relu_are_clipped_too():
    x = torch.randn(COUNT).relu()
    x[:5] = 100.0
    assert gain(x, keep=slice(5, None)) > 20


def test_each_end_is_clipped_on_its_own():
    # A dense upper end that must stay, and a thin lower one that need not.
    x = torch.cat((10 * torch.rand(COUNT), -Exponential(0.3).sample((COUNT // 100,))))
    observer = HistogramObserver()
    observer(x)
    scale, zero_point = observer.calculate_qparams()
    assert (255 - zero_point) * scale > 9.9
    assert zero_point * scale < 0.95 * -x.min()
    assert gain(x) > -0.5


def test_outliers_that_cost_the_rest_little_are_kept():
    x = torch.cat((10 * torch.rand(COUNT), torch.linspace(-18, -12, COUNT // 1000)))
    assert gain(x) > -0.5


def test_auto_clips_only_where_there_are_outliers():
    x = torch.randn(COUNT)
    assert gain(x, name="auto") == 0
    assert gain(x) != 0
    x[:5] = 100.0
    assert gain(x, keep=slice(5, None), name="auto") > 12


def test_exact_zeros_do_not_sway_the_range():
    x = torch.randn(20_000)
    crowded = torch.cat((x, torch.zeros(500_000)))
    plain, other = HistogramObserver(), HistogramObserver()
    plain(x)
    other(crowded)
    assert torch.equal(plain.histogram, other.histogram)
    assert plain.calculate_qparams() == other.calculate_qparams()


def test_bins_hold_what_a_loop_would_count():
    observer = HistogramObserver(bins=16)
    batches = [torch.randn(30), torch.randn(30) * 7, torch.tensor([0.0, 100.0]), torch.randn(30)]
    for batch in batches:
        observer(batch)
    width, first = observer.width.item(), int(observer.first)
    expected = [0] * 16
    for value in torch.cat(batches).tolist():
        if value != 0:
            expected[int(value // width) - first] += 1
    assert observer.histogram.tolist() == expected
    assert width == 8.0  # the smallest power of two of which 15 bins span the range
