"""Numbers that a model keeps as tensors are numbers of the graph."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.tracing.number_tensors import numbers_in

W = 8


class PadsByBuffers(nn.Module):
    """The padding is computed of buffers with one number each, and of the length."""

    def __init__(self, kernel=5, stride=3):
        super().__init__()
        self.conv = nn.Conv1d(W, W, kernel, stride)
        self.fc = nn.Linear(W, W)
        self.register_buffer("kernel", torch.tensor(kernel), persistent=False)
        self.register_buffer("stride", torch.tensor(stride), persistent=False)

    def forward(self, x):
        length = x.shape[1]
        frames = torch.ceil((length - self.kernel) / self.stride + 1).to(torch.int64)
        extra = (frames - 1) * self.stride + self.kernel - length
        if extra > 0:
            x = nn.functional.pad(x, (0, 0, 0, extra))
        return self.fc(self.conv(x.transpose(1, 2)).transpose(1, 2))


class OnePart(nn.Module):
    """A loop over parts of the length, of which there is one that is as long."""

    def __init__(self, part=None):
        super().__init__()
        self.fc, self.part = nn.Linear(W, W), part

    def forward(self, x):
        length = x.shape[1]
        part = length if self.part is None else self.part
        parts = [self.fc(x[:, start : start + part]) for start in range(0, length, part)]
        return torch.cat(parts, 1)


class CountsItsCalls(nn.Module):
    """A number that changes from call to call is none that a graph may have."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(W, W)
        self.register_buffer("calls", torch.tensor(1))

    def forward(self, x):
        self.calls += 1
        return self.fc(x) * self.calls


@pytest.mark.parametrize("build", [PadsByBuffers, OnePart])
def test_a_graph_of_any_length_that_can_be_saved(tmp_path, build):
    torch.manual_seed(0)
    model = build().eval()
    gm = fxquant.trace(model, torch.randn(2, 11, W))
    report = fxquant.trace_report(gm)
    assert not report.opaque
    assert not report.refused
    fxquant.save_model(gm, tmp_path / "model.fxq")
    loaded = fxquant.load_model(tmp_path / "model.fxq")
    for length in (5, 6, 7, 8, 20, 33):
        x = torch.randn(3, length, W)
        torch.testing.assert_close(loaded(x), model(x))


def test_a_number_that_a_forward_changes_is_the_models_at_each_call():
    torch.manual_seed(0)
    model = CountsItsCalls().eval()
    gm, x = fxquant.trace(model, torch.randn(2, 5, W)), torch.randn(2, 5, W)
    expected = [model.fc(x) * number for number in (2, 3)]
    for wanted in expected:
        torch.testing.assert_close(gm(x), wanted)


def test_only_whole_numbers_in_buffers_are_numbers():
    model = nn.Module()
    for name, value in {"a": 3, "b": [3], "c": 0.5, "d": True}.items():
        model.register_buffer(name, torch.tensor(value))
    assert numbers_in(model) == {"a": 3}
