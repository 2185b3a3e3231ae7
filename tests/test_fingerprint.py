"""The fingerprint can fail: each change here is seen, and looking changes nothing."""

import collections
import functools
import gc
import os
import random
import threading
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.fingerprint import differences, fingerprint, unchanged

W = 8


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Settings:
    def __init__(self):
        self.level = 1
        self.seen = {"a": [1, 2]}


class Subject(nn.Module):
    """Something of everything that a call may change."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(W, W)
        self.norm = nn.BatchNorm1d(W)
        self.again = self.first
        self.parametrized = nn.Linear(W, W)
        parametrize.register_parametrization(self.parametrized, "weight", Double())
        self.register_buffer("table", torch.tensor([float("nan"), 1.0]))
        self.count = 0
        self.history = [torch.zeros(2), {"k": (1, 2.5, float("nan"))}]
        self.names = {"a", "b"}
        self.settings = Settings()
        self.queue = collections.deque([1])
        self.generator = torch.Generator().manual_seed(3)
        self.numbers = (i for i in range(5))
        self.array = np.zeros(3)
        self.lock = threading.Lock()
        self.hidden = [nn.Linear(W, W)]
        self.first.register_forward_hook(print)
        self.first.register_forward_pre_hook(print)
        self.norm.forward = types.MethodType(lambda self, x: x, self.norm)
        self.loss = functools.partial(round, ndigits=2)
        self.first.weight.grad = torch.ones(W, W)

    def forward(self, x):
        return self.first(x)


DATA = ({"x": torch.randn(2, W), "more": [torch.arange(3)]}, [(torch.ones(1), None)])


def set_to(tensor, value):
    tensor.data.view(-1)[0] = value


def replace_parameter(model):
    model.first.weight = nn.Parameter(model.first.weight.detach(), requires_grad=True)


def move_memory(model):
    model.first.weight.data = model.first.weight.data.clone()


def reorder_hooks(model):
    model.first.register_forward_hook(print)
    model.first._forward_hooks.move_to_end(next(iter(model.first._forward_hooks)))


CHANGES = {
    "a weight": lambda m: set_to(m.first.weight, 7.0),
    "a weight, by the last bit": lambda m: m.first.weight.data.view(torch.int32).bitwise_xor_(1),
    "a buffer": lambda m: set_to(m.table, 7.0),
    "a NaN for another NaN": lambda m: m.table.view(torch.int32).bitwise_xor_(1),
    "another Parameter object": replace_parameter,
    "other memory": move_memory,
    "a dtype": lambda m: m.first.bfloat16(),
    "requires_grad": lambda m: m.first.weight.requires_grad_(False),
    "a gradient": lambda m: m.first.weight.grad.add_(1),
    "a gradient that is gone": lambda m: m.zero_grad(),
    "a new gradient": lambda m: setattr(m.first.bias, "grad", torch.zeros(W)),
    "a training flag": lambda m: m.norm.eval(),
    "an attribute": lambda m: setattr(m, "count", 1),
    "the type of an attribute": lambda m: setattr(m, "count", False),
    "a new attribute": lambda m: setattr(m, "fresh", None),
    "an attribute that is gone": lambda m: delattr(m, "count"),
    "a list": lambda m: m.history.append(1),
    "a tensor in a list": lambda m: m.history[0].add_(1),
    "a value deep inside": lambda m: m.history[1].update(k=(1, 2.6, float("nan"))),
    "a set": lambda m: m.names.add("c"),
    "an object of the user's": lambda m: setattr(m.settings, "level", 2),
    "a list in an object": lambda m: m.settings.seen["a"].append(3),
    "a queue": lambda m: m.queue.append(2),
    "a torch generator": lambda m: torch.rand(1, generator=m.generator),
    "a Python generator": lambda m: next(m.numbers),
    "an array": lambda m: m.array.fill(1),
    "another lock": lambda m: setattr(m, "lock", threading.Lock()),
    "a layer in a plain list": lambda m: set_to(m.hidden[0].weight, 7.0),
    "a hook more": lambda m: m.first.register_forward_hook(print),
    "a hook less": lambda m: m.first._forward_hooks.clear(),
    "a pre-hook more": lambda m: m.register_forward_pre_hook(print),
    "a backward hook more": lambda m: m.first.register_full_backward_hook(print),
    "a hook on a tensor": lambda m: m.first.weight.register_hook(print),
    "the order of hooks": reorder_hooks,
    "a patched forward that is gone": lambda m: delattr(m.norm, "forward"),
    "a patched forward": lambda m: setattr(m.first, "forward", print),
    "a class": lambda m: setattr(m.first, "__class__", nn.Identity),
    "a class, by parametrization": lambda m: parametrize.remove_parametrizations(
        m.parametrized, "weight"
    ),
    "a property of a class": lambda m: delattr(type(m.parametrized), "weight"),
    "a child": lambda m: setattr(m, "first", nn.Linear(W, W)),
    "a child more": lambda m: m.add_module("fresh", None),
    "the order of children": lambda m: m._modules.update(first=m._modules.pop("first")),
    "one of two names": lambda m: setattr(m, "again", m.hidden[0]),
    "data": lambda m: DATA[0]["x"].mul_(2),
    "integers in data": lambda m: DATA[0]["more"][0].add_(1),
    "the form of data": lambda m: DATA[1].append(None),
    "torch's random state": lambda m: torch.rand(1),
    "Python's random state": lambda m: random.random(),
    "numpy's random state": lambda m: np.random.rand(1),
    "grad mode": lambda m: torch.set_grad_enabled(False),
    "the default dtype": lambda m: torch.set_default_dtype(torch.float64),
    "threads": lambda m: torch.set_num_threads(torch.get_num_threads() + 1),
    "the fast path": lambda m: torch.backends.mha.set_fastpath_enabled(False),
    "deterministic": lambda m: torch.use_deterministic_algorithms(True),
    "autocast": lambda m: torch.set_autocast_enabled("cpu", True),
    "autocast's dtype": lambda m: torch.set_autocast_dtype("cpu", torch.float16),
    "warnings": lambda m: warnings.simplefilter("always"),
    "a method of a torch class": lambda m: setattr(nn.Linear, "forward", print),
    "a function of torch": lambda m: setattr(nn.functional, "linear", print),
    "a hook for all modules": lambda m: nn.modules.module.register_module_forward_hook(print),
    "the environment": lambda m: os.environ.update(FXQUANT_TEST="1"),
    "garbage collection": lambda m: gc.disable(),
}


@pytest.fixture(autouse=True)
def _put_back():
    """These tests change their process on purpose."""
    forward, linear = nn.Linear.forward, nn.functional.linear
    rows = [t.clone() for t in (DATA[0]["x"], DATA[0]["more"][0])]
    environment = dict(os.environ)
    grad, dtype, threads = torch.is_grad_enabled(), torch.float32, torch.get_num_threads()
    autocast = torch.get_autocast_dtype("cpu")
    yield
    nn.Linear.forward, nn.functional.linear = forward, linear
    nn.modules.module._global_forward_hooks.clear()
    DATA[0]["x"].copy_(rows[0])
    DATA[0]["more"][0].copy_(rows[1])
    del DATA[1][1:]
    os.environ.clear()
    os.environ.update(environment)
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_dtype("cpu", autocast)
    gc.enable()


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen_and_named(what):
    model = Subject()
    before = fingerprint(model, *DATA)
    assert differences(before, fingerprint(model, *DATA)) == []
    CHANGES[what](model)
    after = fingerprint(model, *DATA)
    lines = differences(before, after)
    assert lines
    assert all(": " in line for line in lines)


def test_the_lines_tell_what_changed():
    model = Subject()

    def change():
        set_to(model.first.weight, 7.0)
        model.norm.eval()
        torch.rand(1)

    with pytest.raises(AssertionError) as caught, unchanged(model, *DATA):
        change()
    text = str(caught.value)
    assert f"model.first.weight values: 1 of {W * W} values changed" in text
    assert "model.norm.training: True -> False" in text
    assert "torch's random state: " in text


def test_a_block_that_raises_is_checked_too():
    model = Subject()

    def interrupt(count):
        model.count = count
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), unchanged(model):
        interrupt(0)
    with pytest.raises(AssertionError, match="model.count: 0 -> 1") as caught, unchanged(model):
        interrupt(1)
    assert isinstance(caught.value.__context__, KeyboardInterrupt)


def test_a_change_that_is_undone_is_none():
    model = Subject()
    with unchanged(model, *DATA):
        model.eval()
        model.train()
        handle = model.first.register_forward_hook(print)
        handle.remove()
        with torch.no_grad(), torch.random.fork_rng():
            torch.rand(1)


def test_a_scripted_and_a_compiled_child_are_looked_at(recwarn):
    scripted = nn.Sequential(torch.jit.script(nn.Linear(W, W)), torch.compile(nn.Linear(W, W)))
    with unchanged(scripted):
        pass
    for child in (scripted[0], scripted[1]._orig_mod):
        with pytest.raises(AssertionError, match="1 of 8 values changed"), unchanged(scripted):
            set_to(child.bias, 7.0)
