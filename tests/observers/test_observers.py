import copy
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
)
from fxquant.errors import CalibrationError, OptionError

NAMES = ["minmax", "movingaverage", "ema", "histogram", "kl", "auto"]
RANGES = {("uint8", False): (0, 255), ("int8", True): (-128, 127), ("int8", False): (-128, 127)}
# Dividing subnormal numbers may lose their sign, and with it their bin.
FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("integer", "symmetric"), RANGES)
@pytest.mark.parametrize(
    "x",
    [
        torch.linspace(1, 2, 50),
        -torch.linspace(1, 2, 50),
        torch.zeros(10),
        torch.full((10,), 1e-30),
        torch.full((10,), 1e-45),
        torch.tensor([1e30, -1e-30]),
        torch.tensor([3e38, -3e38]),
        torch.tensor(3.0),
    ],
    ids=["positive", "negative", "zeros", "tiny", "subnormal", "wide", "widest", "scalar"],
)
def test_the_zero_point_is_one_of_the_integers_and_the_scale_is_usable(name, integer, symmetric, x):
    observer = create_observer(name, integer=integer, symmetric=symmetric)
    assert observer(x) is x
    scale, zero_point = observer.calculate_qparams()
    low, high = RANGES[integer, symmetric]
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
    assert low <= int(zero_point) <= high
    assert 0 < scale < math.inf
    if symmetric:
        assert int(zero_point) == 0


@given(st.lists(FLOATS, min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_min_max_rounds_every_value_by_at_most_half_a_step(values):
    x = torch.tensor(values)
    observer = MinMaxObserver()
    observer(x)
    scale, zero_point = (p.double() for p in observer.calculate_qparams())
    q = (x.double() / scale + zero_point).round().clamp(0, 255)
    # The zero point is rounded too, which moves one end of the range by up to half a step.
    assert ((q - zero_point) * scale - x).abs().max() <= scale * 1.001


@pytest.mark.parametrize("integer", ["uint8", "int8"])
def test_a_symmetric_grid_spans_as_much_on_either_side(integer):
    observer = MinMaxObserver(integer=integer, symmetric=True)
    observer(torch.tensor([-1.0, 12.7]))
    scale, zero_point = observer.calculate_qparams()
    assert scale.item() == pytest.approx(0.1)
    assert int(zero_point) == {"uint8": 128, "int8": 0}[integer]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_every_float_type_gives_the_ranges_of_its_values(name, dtype):
    x = torch.randn(50, 8).to(dtype)
    narrow, wide = create_observer(name), create_observer(name)
    assert narrow(x) is x
    wide(x.float())
    assert narrow.calculate_qparams() == wide.calculate_qparams()


@pytest.mark.parametrize("name", NAMES)
def test_observing_never_asks_the_device_for_a_value(name):
    # A meta tensor has no values: reading one is an error.
    observer = create_observer(name)
    for _ in range(2):
        observer(torch.empty(4, 3, device="meta"))
    assert {b.device.type for b in observer.buffers()} == {"meta"}


@pytest.mark.parametrize("name", NAMES)
def test_empty_tensors_and_layouts_make_no_difference(name):
    x = torch.randn(6, 8)
    plain, other = create_observer(name), create_observer(name)
    plain(x)
    other(torch.empty(0, 8))
    with torch.inference_mode():
        other(x.t())
    assert plain.calculate_qparams() == other.calculate_qparams()
    other(x)
    assert other.statistics().count == 2 * x.numel()


def test_gradients_flow_through_and_never_into_the_state():
    observer = HistogramObserver()
    x = torch.randn(5, requires_grad=True)
    observer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(5))
    assert not any(b.requires_grad for b in observer.buffers())


@pytest.mark.parametrize("name", NAMES)
def test_the_state_lives_in_buffers(name):
    observer, other = create_observer(name), create_observer(name)
    for batch in torch.randn(3, 100):
        observer(batch)
    other.load_state_dict(observer.state_dict())
    assert other.calculate_qparams() == observer.calculate_qparams()
    assert other.statistics() == observer.statistics()


@given(st.lists(FLOATS, min_size=2, max_size=40), st.integers(1, 39))
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
        assert one.statistics() == both.statistics()
        assert one.statistics().count == len(values)
        if observer_type is HistogramObserver:
            assert torch.equal(one.histogram, both.histogram)
            assert (one.width, one.first) == (both.width, both.first)
            assert int(one.histogram.sum()) == int((x != 0).sum())


@pytest.mark.parametrize("name", NAMES)
def test_merging_with_one_that_saw_nothing_adds_nothing(name):
    x = torch.randn(100)
    seen, empty = create_observer(name), create_observer(name)
    seen(x)
    expected = seen.calculate_qparams()
    empty_too = copy.deepcopy(empty)
    empty_too.merge(empty)
    assert not empty_too.has_seen_values
    seen.merge(empty)
    empty.merge(seen)
    empty_too(x)
    for observer in (seen, empty, empty_too):
        assert observer.calculate_qparams() == expected


def test_the_moving_average_follows_batches():
    observer = MovingAverageMinMaxObserver(averaging_constant=0.5)
    observer(torch.tensor([0.0, 10.0]))
    observer(torch.tensor([0.0, 20.0]))
    assert observer.calculate_qparams()[0].item() == pytest.approx(15 / 255)
    other = MovingAverageMinMaxObserver(averaging_constant=0.5)
    other(torch.tensor([0.0, 30.0]))
    other(torch.tensor([0.0, 5.0]))
    observer.merge(other)
    assert observer.calculate_qparams()[0].item() == pytest.approx(13.75 / 255)


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
        observer.statistics()


@pytest.mark.parametrize("name", NAMES)
def test_a_reset_observer_is_like_a_new_one(name):
    used, new = create_observer(name), create_observer(name)
    used(torch.randn(50) * 1e3)
    used(torch.tensor([math.nan]))
    used.reset()
    x = torch.randn(50)
    used(x)
    new(x)
    assert used.calculate_qparams() == new.calculate_qparams()
    assert used.statistics() == new.statistics()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_errors_even_when_later_batches_are_fine(name, bad):
    observer = create_observer(name)
    observer(torch.tensor([1.0, bad]))
    observer(torch.ones(3))
    for ask in (observer.check, observer.statistics, observer.calculate_qparams):
        with pytest.raises(CalibrationError, match="NaN or Inf.*Look at that batch"):
            ask()
    merged = create_observer(name)
    merged(torch.ones(3))
    merged.merge(observer)
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        merged.check()


@pytest.mark.parametrize("size", [1.0, 1e-15, 1e15])
def test_statistics_tell_range_and_outliers(size):
    observer = MinMaxObserver()
    observer(torch.tensor([3.0, -4.0], dtype=torch.bfloat16) * size)
    statistics = observer.statistics()
    assert statistics.count == 2
    assert statistics.low == pytest.approx(-4 * size, rel=0.01)
    assert statistics.high == pytest.approx(3 * size, rel=0.01)
    assert statistics.rms == pytest.approx(math.sqrt(12.5) * size, rel=0.01)
    assert statistics.outlier_ratio == pytest.approx(4 / math.sqrt(12.5), rel=0.01)


def test_statistics_stay_finite_where_squares_do_not():
    for size in (1e30, 1e-30):
        observer = MinMaxObserver()
        observer(torch.full((5,), size))
        assert observer.statistics().outlier_ratio == 1.0
        assert observer.statistics().rms <= observer.statistics().high


def test_the_rms_of_many_values_is_accurate():
    x = torch.rand(2000, 1000) + 0.5
    observer = MinMaxObserver()
    observer(x)
    assert observer.statistics().rms == pytest.approx(
        float(x.double().square().mean().sqrt()), 1e-6
    )


def test_unknown_names_and_options_list_the_valid_ones():
    with pytest.raises(OptionError, match="'minmax'.*Did you mean 'histogram'"):
        create_observer("histogramm")
    with pytest.raises(OptionError, match=r"unknown options \['bin'\].*\['bins', 'integer'"):
        create_observer("histogram", bin=3)
    with pytest.raises(OptionError, match="'uint8', 'int8'"):
        create_observer("minmax", integer="uint4")
    with pytest.raises(OptionError, match="averaging_constant.*larger value"):
        create_observer("ema", averaging_constant=0)
    with pytest.raises(OptionError, match="bins.*at least 2.*2048"):
        create_observer("histogram", bins=1)
    with pytest.raises(CalibrationError, match="int64.*not token ids"):
        MinMaxObserver()(torch.ones(3, dtype=torch.long))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (HistogramObserver(64), HistogramObserver(128)),
        (MinMaxObserver(), MinMaxObserver(symmetric=True)),
        (MovingAverageMinMaxObserver(0.1), MovingAverageMinMaxObserver(0.2)),
        (MinMaxObserver(), HistogramObserver()),
        (HistogramObserver(), create_observer("auto")),
    ],
)
def test_unlike_observers_do_not_merge(one, other):
    with pytest.raises(OptionError, match="one kind with the same options"):
        one.merge(other)
