"""What batches leave behind between two turns."""

import gc
import weakref

import torch
from torch import nn

import fxquant
from fxquant.graph.stepper import narrowest_place
from fxquant.passes.held_values import HeldValues

WIDTH, WIDE, ROWS = 32, 256, 8
X = [torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(3)]
OPTIONS = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}


class Block(nn.Module):
    """A wide layer in the middle, around which a residual goes."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.head((x + self.down(torch.relu(self.up(x)))).tanh())


def test_the_narrowest_place_is_behind_the_sum():
    gm = fxquant.trace(Block(), X[0])
    names = [node.name for node in gm.graph.nodes]
    start, stop = names.index("down"), names.index("head")
    place = narrowest_place(gm, start, stop)
    assert start < place <= stop
    assert names[place - 1].startswith("add")
    assert narrowest_place(gm, start, start) == start


def test_the_float_graph_leaves_no_wide_value_and_the_last_turn_none(monkeypatch):
    sizes: dict[int, list[list[int]]] = {}
    put = HeldValues.put

    def noting(held, key, values):
        sizes.setdefault(key, []).append([sum(v.numel() for v in part.values()) for part in values])
        put(held, key, values)

    monkeypatch.setattr(HeldValues, "put", noting)
    fxquant.quantize(Block(), X, method="gptq", **OPTIONS)
    assert len(sizes) > len(X)  # some rows of a batch are held out
    for found in sizes.values():
        in_float, quantized = found[1]  # at `down`
        assert in_float / WIDTH == quantized / (WIDTH + WIDE) > 0
        assert found[-1] == [0, 0]


def test_values_that_left_are_freed_without_a_search_for_cycles():
    held = HeldValues(None)
    gc.disable()
    try:
        value = torch.zeros(100)
        freed = weakref.ref(value)
        held.put(0, [{"x": (value, None)}])
        del value
        held.take(0)
        assert freed() is None
    finally:
        gc.enable()
