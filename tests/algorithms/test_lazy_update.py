import pytest
import torch

from fxquant.algorithms.lazy_update import lazy_update


@pytest.mark.parametrize("columns", [1, 2, 8, 9, 37, 64])
def test_it_is_the_plain_loop_in_another_order(columns):
    values, coupling = torch.randn(columns, 5).double(), torch.randn(columns, columns).double() / 8

    def step(i, column):
        return (column + i).round()

    expected, changes = values.clone(), []
    for i in range(columns):
        changes.append(step(i, expected[i]))
        expected[i + 1 :] += coupling[i, i + 1 :, None] * changes[-1]
    assert torch.allclose(lazy_update(values, coupling, step), torch.stack(changes))
    assert torch.allclose(values, expected)
