import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxquant
from fxquant.graph.calls import Call
from fxquant.observers.input_statistics import SAMPLE, InputStatistics
from fxquant.passes.observe_inputs import expected_inputs, observe_inputs

X = [torch.randn(4, 5, 8) * torch.arange(1, 9) + 1, torch.randn(3, 5, 8)]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, attention_mask=None):
        h = self.norm(x)
        return self.a(h) + self.b(h) + self.c(x)


def test_statistics_are_those_of_the_tokens_and_shared_inputs_collect_once():
    gm = fxquant.trace(Branches(), X[0])
    found = observe_inputs(gm, ["a", "b", "c"], [Call((x,)) for x in X])
    assert found["a"] is found["b"]
    tokens = torch.cat([x.flatten(0, 1) for x in X])
    c = found["c"]
    assert c.tokens == len(tokens) == 35
    assert torch.allclose(c.mean, tokens.mean(0), atol=1e-5)
    assert torch.allclose(c.mean_square, tokens.square().mean(0), rtol=1e-4)
    assert torch.allclose(c.mean_abs, tokens.abs().mean(0), rtol=1e-4)
    assert torch.equal(c.largest, tokens.abs().amax(0))
    assert len(c.sample) == 35
    assert found["a"].tokens == 35


def test_padding_is_masked_out():
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[:, 3:] = 0
    call = Call((), {"x": X[0], "attention_mask": mask})
    gm = fxquant.trace(Branches(), call.kwargs)
    found = observe_inputs(gm, ["c"], [call])["c"]
    assert found.tokens == 12
    assert torch.allclose(found.mean, X[0][:, :3].flatten(0, 1).mean(0), atol=1e-5)


def test_the_sample_is_bounded_and_spread_over_batches():
    statistics = InputStatistics(1)
    for number in range(10):
        statistics.add(torch.full((300, 1), float(number)))
    assert len(statistics.sample) == SAMPLE
    assert len(statistics.sample.unique()) == 10
    assert statistics.tokens == 3000


def test_layers_after_a_norm_need_no_data():
    model = Branches()
    nn.init.normal_(model.norm.bias)
    nn.init.normal_(model.norm.weight)
    gm = fxquant.trace(model, X[0])
    found = expected_inputs(gm)
    assert set(found) == {"a", "b"}
    seen = observe_inputs(gm, ["a"], [Call((torch.randn(400, 50, 8),))])["a"]
    assert torch.allclose(found["a"].mean, seen.mean, atol=0.05)
    assert torch.allclose(found["a"].mean_square, seen.mean_square, rtol=0.05, atol=0.02)


class Grouped(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1, groups=groups)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("groups", [2, 16])
def test_groups_of_a_convolution_are_watched_in_one_and_are_those_of_each_group(groups):
    model, batches = Grouped(groups), [torch.randn(2, 16, 6, 5), torch.randn(1, 16, 4, 4) + 1]
    gm = fxquant.trace(model, batches[0])
    found = observe_inputs(gm, ["conv"], [Call((x,)) for x in batches])
    assert list(found) == [f"conv[{group}]" for group in range(groups)]
    for group, statistics in enumerate(found.values()):
        alone = InputStatistics(16 // groups * 9)
        for x in batches:
            own = x.chunk(groups, 1)[group]
            alone.add(nn.functional.unfold(own, 3, padding=1).movedim(1, -1))
        assert statistics.tokens == alone.tokens
        for name in ("mean", "mean_square", "mean_abs", "lowest", "highest"):
            assert torch.allclose(getattr(statistics, name), getattr(alone, name), atol=1e-6)
            steady = statistics.steadied().mean_square
            assert torch.allclose(steady, alone.steadied().mean_square, atol=1e-6)


class Counted(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::fxquant.AccuracyWarning")
def test_what_a_depthwise_convolution_costs_does_not_grow_with_its_channels():
    def calls(channels):
        model = nn.Sequential(nn.Conv2d(channels, channels, 3, groups=channels), nn.Flatten())
        x = [torch.randn(1, channels, 5, 5), torch.randn(2, channels, 5, 5)]
        with Counted() as counted:
            _, info = fxquant.static_quantize(model, x, method="rtn")
        assert info.decisions[0].action == "int8"
        return counted.calls

    calls(256)  # the first call of a process does more
    assert calls(512) < calls(128) + 384
