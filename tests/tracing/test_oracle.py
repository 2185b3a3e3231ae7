"""On which sizes the user's model runs while it is traced, and what is learnt from them."""

import pytest
import torch
from torch import nn

from fxquant.graph.calls import Call
from fxquant.tracing.oracle import Oracle


def oracle_of(lengths: range, x: torch.Tensor) -> tuple[Oracle, list[tuple[int, ...]]]:
    """Of a layer that takes some lengths only, and the sizes on which it ran."""
    sizes: list[tuple[int, ...]] = []

    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            if x.shape[1] not in lengths:
                raise ValueError(f"no length {x.shape[1]}")
            result = self.fc(x)
            sizes.append(tuple(x.shape[:2]))
            return result

    return Oracle(Noting(), Call((x,))), sizes


def test_a_long_example_runs_whole_only_to_be_compared():
    oracle, sizes = oracle_of(range(1, 1000), torch.randn(8, 256, 4))
    assert [axis.size for axis in oracle.axes] == [3, 256]
    whole = [size for size in sizes if size[1] > 32]
    assert whole == [(3, 256)] * 2  # the example, and other values right after it
    assert {(1, 24), (2, 24), (3, 1), (3, 7), (1, 16)} <= set(sizes)


@pytest.mark.parametrize("least", [100, 256])
def test_a_model_that_takes_long_inputs_only_is_asked_at_these(least):
    oracle, sizes = oracle_of(range(least, 257), torch.randn(8, 256, 4))
    takes_255 = least < 256
    assert [axis.size for axis in oracle.axes] == [3, 256][: 1 + takes_255]
    assert {(1, 256), (2, 256)} <= set(sizes)
    assert ((3, 255) in sizes) is takes_255


def test_a_large_example_runs_with_few_rows_and_each_size_once():
    sizes: list[tuple[int, ...]] = []

    class Film(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            sizes.append(tuple(x.shape))
            return self.fc(x).mean(2)

    oracle = Oracle(Film(), Call((torch.randn(3, 5, 20_000, 4),)))
    whole = [size for size in sizes if size == (3, 5, 20_000, 4)]
    assert len(whole) == 2  # the example, and other values right after it
    others = [size for size in sizes if size not in whole]
    assert len(set(others)) == len(others)
    assert [size for size in others if size[0] > 1] == [(2, 5, 20_000, 4)]
    assert not [size for size in others if size[1] > 5 or size[2] > 20_000]
    assert [axis.size for axis in oracle.axes] == [3, 5, 20_000]
    assert {answer.call.tensors()[0].shape[1] for answer in oracle.answers} == {1, 2, 4, 5}
