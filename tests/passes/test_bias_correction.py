import pytest
import torch
from torch import nn

import fxquant

X = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))


def mean_share(data, **options):
    """The share of the output's error that is the same for all tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), nn.Linear(128, 64, bias=False)).eval()
    graph, _ = fxquant.quantize(
        model, data, example_inputs=X, accuracy_warning="ignore", group_size=32, **options
    )
    with torch.no_grad():
        error = graph(X) - model(X)
    return float(error.mean(0).square().mean() / error.square().mean())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("method", "left"), [("rtn", 0.5), ("gptq", 0.05)])
def test_the_mean_error_of_inputs_with_a_mean_goes_into_the_bias(bits, method, left):
    """Inputs behind a ReLU have a mean, and so has the error of a product with them.

    Rounding alone trusts the mean of few tokens less than what it knows without data.
    """
    without = mean_share(None, method="rtn", bits=bits)
    assert without > 0.2
    assert mean_share([X], method=method, bits=bits) < left * without
