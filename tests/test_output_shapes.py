"""Models whose output's shape depends on values: a quantized one may give another shape."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import CalibrationError

OPTIONS = {"group_size": 32, "skip_param_threshold": 0}


class PredictsItsLength(nn.Module):
    """A layer's output says how long the result is, as in models that read text aloud."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.length = nn.Linear(64, 64)

    def forward(self, x):
        count = self.length(x.mean(1)).abs().sum().mul(30).long()
        return self.second(self.first(x).mean(1)[:, None] * torch.arange(count)[None, :, None])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return PredictsItsLength().eval()


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    return [torch.randn(3, 5, 64) for _ in range(3)]


@pytest.mark.parametrize("method", ["auto", "rtn", "gptq"])
def test_it_is_quantized_and_the_record_says_what_could_not_be_measured(model, data, method):
    with pytest.warns(fxquant.AccuracyWarning, match="depends on the values"):
        qmodel, info = fxquant.static_quantize(model, data, method=method, **OPTIONS)
    assert len(info.selected_layers) == 3
    assert info.sqnr_db is None
    assert all(row.introduced_sqnr_db > 15 for row in info.rows)
    assert qmodel(data[0]).shape[1] != model(data[0]).shape[1]


def test_sensitivity_of_the_output_is_refused_in_words_and_that_of_layers_is_not(model, data):
    with pytest.raises(CalibrationError, match="depends on the values of the input"):
        fxquant.sensitivity(model, data, method="exact", **OPTIONS)
    assert len(fxquant.sensitivity(model, data, **OPTIONS).rows) == 3


def test_another_metric_can_compare_them(model, data):
    report = fxquant.sensitivity(
        model, data, method="exact", metric=lambda a, b: abs(a.shape[1] - b.shape[1]), **OPTIONS
    )
    errors = {row.module: row.output_errors[4] for row in report.rows}
    assert errors["length"] > 0 == errors["second"]
