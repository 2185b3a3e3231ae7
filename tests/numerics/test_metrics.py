import math

import torch

from fxquant.numerics.metrics import SqnrMeter, sqnr_db


def test_sqnr_is_ten_times_the_logarithm_of_the_power_ratio():
    assert sqnr_db(torch.tensor([10.0]), torch.tensor([9.0])) == 20.0


def test_a_global_scale_error_counts():
    x = torch.randn(100)
    assert abs(sqnr_db(x, 1.1 * x) - 20) < 1e-4


def test_equal_tensors_are_infinitely_good_and_nan_stays_nan():
    x = torch.randn(5)
    assert sqnr_db(x, x) == math.inf
    assert math.isnan(sqnr_db(x, x * math.nan))


def test_batches_add_up_to_the_whole():
    a, b = torch.randn(2, 30)
    meter = SqnrMeter()
    assert meter.db_or_none is None
    for part in range(3):
        meter.add(a[part * 10 : part * 10 + 10], b[part * 10 : part * 10 + 10])
    assert abs(meter.db - sqnr_db(a, b)) < 1e-9
