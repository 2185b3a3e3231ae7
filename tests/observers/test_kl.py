"""The vectorised search against naive loops."""

import math

import pytest
import torch

from fxquant.numerics.integers import INT8, UINT4, UINT8
from fxquant.observers.grid import Grid
from fxquant.observers.kl import best_range, divergence, squared_error


def naive_divergence(centres, counts, integer):
    levels = [round(c) for c in centres]
    inside = [i for i, q in enumerate(levels) if integer.quant_min <= q <= integer.quant_max]
    if not inside:
        return math.inf
    p = {i: counts[i] for i in inside}
    for i, q in enumerate(levels):
        if q < integer.quant_min:
            p[inside[0]] += counts[i]
        if q > integer.quant_max:
            p[inside[-1]] += counts[i]
    q = {}
    for i in inside:
        same = [j for j in inside if levels[j] == levels[i]]
        q[i] = sum(counts[j] for j in same) / len(same)
    return sum(
        p[i] / sum(p.values()) * math.log(p[i] / sum(p.values()) / (q[i] / sum(q.values())))
        for i in inside
    )


def candidates(integer):
    """Maps of 40 bins onto the integers: wide, clipped below, above, both, and to nothing."""
    bins = torch.arange(40, dtype=torch.float64)
    middle = (integer.quant_min + integer.quant_max) / 2
    scales = torch.tensor([0.3, 0.7, 2.0, 11.0, 11.0, 11.0, 1.0], dtype=torch.float64)[:, None]
    shifts = torch.tensor([0.0, 0, 0, 150, -150, 0, 1000], dtype=torch.float64)[:, None]
    return (bins - 19.3) * scales + middle + shifts, scales


@pytest.mark.parametrize("integer", [UINT4, INT8, UINT8], ids=lambda i: i.name)
def test_the_divergence_is_that_of_a_loop(integer):
    centres, _ = candidates(integer)
    counts = torch.randint(1, 100, (40,)).double()
    expected = [naive_divergence(c, counts.tolist(), integer) for c in centres.tolist()]
    assert divergence(centres, counts, integer).tolist() == pytest.approx(expected)
    assert expected[-1] == math.inf
    assert expected[0] > 0.01


@pytest.mark.parametrize("integer", [UINT4, INT8, UINT8], ids=lambda i: i.name)
def test_the_error_is_that_of_many_values_in_each_bin(integer):
    centres, width = candidates(integer)
    counts = torch.randint(1, 100, (40,)).double()
    offsets = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000 - 0.5
    values = centres[..., None] + offsets * width[..., None]
    errors = (values - values.round().clamp(integer.quant_min, integer.quant_max)) ** 2
    expected = (errors.mean(-1) * counts).sum(1)
    assert torch.allclose(squared_error(centres, width, counts, integer), expected, rtol=1e-4)


def test_a_range_inside_the_levels_diverges_by_nothing():
    centres = torch.arange(40, dtype=torch.float64)[None]
    assert divergence(centres, torch.rand(40).double() + 1, UINT8).item() == 0


def test_only_what_lies_far_beyond_the_tail_is_clipped():
    centres = torch.arange(-1000, 1000, dtype=torch.float64) + 0.5
    counts = 1e5 * torch.exp(-0.5 * (centres / 20) ** 2).round(decimals=6)
    counts[centres == 899.5] = 10
    low, high = best_range(
        counts,
        centres,
        torch.tensor(1.0).double(),
        torch.tensor(-110.0),
        torch.tensor(900.0),
        Grid(UINT8, False),
    )
    assert 60 < high < 110
    assert -110 <= low < -60
    heavy = (1e7 / centres.abs() ** 2).floor()  # the tail of P(|x| > t) ~ 1 / t
    low, high = best_range(
        heavy,
        centres,
        torch.tensor(1.0).double(),
        torch.tensor(-1000.0),
        torch.tensor(1000.0),
        Grid(UINT8, False),
    )
    assert high > 800
    assert low < -800
