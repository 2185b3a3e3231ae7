"""Bars show on a terminal, or when they are asked for, and tell the time left."""

import sys

import torch
from torch import nn

import fxquant
from fxquant.report.progress import steps


class Terminal:
    """Standard error as a terminal has it."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def on_a_terminal(monkeypatch):
    """Not a fixture: between a fixture and its test, pytest puts its own streams in place."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_the_long_steps_of_a_quantization_show_themselves(monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    data = list(torch.randn(32, 64).split(8))
    options = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}
    fxquant.calibrate(fxquant.insert_observers(fxquant.trace(model)), data)
    fxquant.static_quantize(model, data, method="gptq", **options)
    for step in ("calibrating", "fitting layers", "measuring"):
        assert f"{step}:" in terminal.text
    fxquant.quantize(model, **options)
    assert "rounding layers:" in terminal.text


def test_a_bar_knows_how_many_there_are(monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    assert list(steps([1, 2, 3], "counting")) == [1, 2, 3]
    assert "counting: " in terminal.text
    assert "/3 [" in terminal.text


def test_nothing_shows_elsewhere(capsys):
    assert list(steps(iter("ab"), "counting", total=2)) == ["a", "b"]
    assert capsys.readouterr().err == ""
    list(steps("ab", "counting", progress=True))
    assert "counting" in capsys.readouterr().err
