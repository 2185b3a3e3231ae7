import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    create_observer,
    sqnr_db,
)
from fxquant.errors import CalibrationError, OptionError

NAMES = ["minmax", "movingaverage", "ema", "histogram", "kl", "auto"]


def fake_quantized(observer, x):
    scale, zero_point = observer.calculate_qparams()
    return ((x / scale + zero_point).round().clamp(0, 255) - zero_point) * scale


def observed(name, x, parts=7):
    observer = create_observer(name)
    for part in x.chunk(parts):
        assert observer(part) is part
    return observer


def gain_of_histogram(x, keep=None):
    keep = torch.ones_like(x, dtype=torch.bool) if keep is None else keep
    figures = []
    for name in ("minmax", "histogram"):
        y = fake_quantized(observed(name, x), x)
        figures.append(sqnr_db(x[keep], y[keep]))
    return figures[1] - figures[0], figures[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "x",
    [
        torch.linspace(1, 2, 50),
        -torch.linspace(1, 2, 50),
        torch.zeros(10),
        torch.full((10,), 1e-30),
        torch.tensor([1e30, -1e-30]),
        torch.tensor(3.0),
    ],
    ids=["positive", "negative", "zeros", "tiny", "wide", "scalar"],
)
def test_the_zero_point_lies_inside_the_range_and_the_scale_is_usable(name, x):
    scale, zero_point = observed(name, x.reshape(-1), 1).calculate_qparams()
    assert 0 <= int(zero_point) <= 255
    assert scale > 0
    assert math.isfinite(scale)


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_the_histogram_is_never_much_worse_than_min_max(shift):
    normal = torch.randn(100_000)
    x = normal.relu() if shift == 0 else normal + shift
    gain, _ = gain_of_histogram(x)
    assert gain >= -1.5


def test_the_histogram_keeps_normal_data_at_38_db():
    assert gain_of_histogram(torch.randn(100_000))[1] >= 38


@pytest.mark.parametrize("count", [3, 20])
def test_a_few_far_outliers_do_not_spoil_the_rest(count):
    x = torch.randn(50_000)
    x[:count] = 80.0
    gain, _ = gain_of_histogram(x, keep=x.abs() < 40)
    assert gain >= 12


def test_exact_zeros_do_not_sway_the_histogram():
    x = torch.randn(20_000)
    with_zeros = torch.cat((x, torch.zeros(2_000_000)))
    plain = observed("histogram", x).calculate_qparams()
    crowded = observed("histogram", with_zeros).calculate_qparams()
    assert plain[0] == crowded[0]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=40), st.integers(1, 39))
@settings(max_examples=60, deadline=None)
def test_merging_equals_observing_together(values, cut):
    x = torch.tensor(values)
    first, second = x[:cut], x[cut:]
    for observer_type in (MinMaxObserver, HistogramObserver):
        one, two, both = observer_type(), observer_type(), observer_type()
        one(first)
        two(second)
        both(first)
        both(second)
        one.merge(two)
        assert one.calculate_qparams() == both.calculate_qparams()
        assert one.statistics().count == len(values)
        if observer_type is HistogramObserver:
            assert torch.equal(one.histogram, both.histogram)
            assert int(one.histogram.sum()) == int((x != 0).sum())


def test_the_moving_average_follows_batches():
    observer = MovingAverageMinMaxObserver(averaging_constant=0.5)
    observer(torch.tensor([0.0, 10.0]))
    observer(torch.tensor([0.0, 20.0]))
    assert observer.calculate_qparams()[0].item() == pytest.approx(15 / 255)
    other = MovingAverageMinMaxObserver(averaging_constant=0.5)
    other(torch.tensor([0.0, 30.0]))
    observer.merge(other)
    assert observer.calculate_qparams()[0].item() == pytest.approx(20 / 255)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_seen_is_an_error_that_names_the_node(name):
    observer = create_observer(name)
    observer.node_name = "encoder.fc"
    with pytest.raises(CalibrationError, match=r"encoder\.fc.*no observed values.*calibrate"):
        observer.calculate_qparams()
    observer(torch.ones(3))
    observer.calculate_qparams()
    observer.reset()
    with pytest.raises(CalibrationError, match="no observed values"):
        observer.calculate_qparams()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_errors_even_when_later_batches_are_fine(name, bad):
    observer = create_observer(name)
    observer(torch.tensor([1.0, bad]))
    observer(torch.ones(3))
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        observer.calculate_qparams()


def test_statistics_tell_range_and_outliers():
    observer = MinMaxObserver()
    observer(torch.tensor([3.0, -4.0], dtype=torch.bfloat16))
    statistics = observer.statistics()
    assert (statistics.low, statistics.high, statistics.count) == (-4.0, 3.0, 2)
    assert statistics.rms == pytest.approx(math.sqrt(12.5))
    assert statistics.outlier_ratio == pytest.approx(4 / math.sqrt(12.5))


def test_unknown_names_and_options_list_the_valid_ones():
    with pytest.raises(OptionError, match="'minmax'.*Did you mean 'histogram'"):
        create_observer("histogramm")
    with pytest.raises(OptionError, match=r"unknown options \['bin'\].*\['bins'\]"):
        create_observer("histogram", bin=3)
    with pytest.raises(OptionError, match="averaging_constant"):
        create_observer("ema", averaging_constant=0)
    with pytest.raises(OptionError, match="same options"):
        HistogramObserver(64).merge(HistogramObserver(128))
    with pytest.raises(CalibrationError, match="int64.*not token ids"):
        MinMaxObserver()(torch.ones(3, dtype=torch.long))
