"""Values between turns: in memory up to a bound, else in a file without a name."""

import os
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.config.memory import memory_bytes
from fxquant.errors import CalibrationError, FxquantError, OptionError
from fxquant.graph.calls import Call
from fxquant.graph.stepper import Stepper
from fxquant.passes.held_values import HeldValues
from tests import models
from tests.models import WIDTH

X = [torch.randn(4, 5, WIDTH) for _ in range(6)]
QUIET = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}


def test_tensors_come_back_as_they_were():
    base = torch.randn(6, 8)
    values = {"a": base.T, "b": base[2:], "c": (base.bfloat16(), torch.arange(3)), "d": None}
    held = HeldValues(0)
    held.put(0, [values, {"same": base}])
    first, second = held.take(0)
    assert first["a"].stride() == base.T.stride()
    assert torch.equal(first["a"], base.T)
    assert torch.equal(first["c"][0], base.bfloat16())
    assert torch.equal(first["c"][1], torch.arange(3))
    assert first["d"] is None
    second["same"][2] = 7.0  # one memory behind three values
    assert (first["a"][:, 2] == 7.0).all()
    assert (first["b"][0] == 7.0).all()
    assert base[2].abs().max() < 7.0
    held.close()


def test_the_bound_holds_and_room_is_used_again():
    held = HeldValues(2000)
    for turn in range(5):
        for key in range(4):
            if turn:
                (values,) = held.take(key)
                assert float(values["x"].sum()) == 200 * key
            held.put(key, [{"x": torch.full((200,), float(key))}])
            assert held.held_bytes <= 2000
    assert held.file_bytes == 2 * 800
    held.close()


def test_parameters_and_what_is_no_plain_tensor_stay_where_they_are():
    weight, sparse = torch.nn.Parameter(torch.randn(4)), torch.eye(3).to_sparse()
    held = HeldValues(0, [weight])
    values = {"view": weight.detach()[1:], "sparse": sparse, "list": [torch.zeros(2)]}
    held.put(0, [values])
    (found,) = held.take(0)
    assert found["view"].data_ptr() == values["view"].data_ptr()
    assert found["sparse"] is sparse
    assert found["list"] is values["list"]


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(CalibrationError, match="missing.*cannot be written.*TMPDIR"):
        HeldValues(0).put(0, [{"x": torch.zeros(2)}])


@pytest.mark.parametrize("model", [models.Plain, models.BranchInChild, models.CalledTwice])
def test_integers_do_not_depend_on_the_bound(model):
    torch.manual_seed(0)
    gm = fxquant.trace(model().eval(), X[0])
    free, small = (
        fxquant.quantize(gm, X, method="gptq", memory=memory, **QUIET)[0]
        for memory in (None, "2KB")
    )
    expected, found = free.state_dict(), small.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]) if torch.is_tensor(value) else value == found[name]


@pytest.mark.parametrize(
    ("text", "expected"), [("4GB", 4e9), ("1.5 MB", 1.5e6), ("2k", 2e3), (500, 500)]
)
def test_amounts(text, expected):
    assert memory_bytes(text) == expected


@pytest.mark.parametrize("text", ["4 apples", "0", "-1GB", True, ""])
def test_what_is_no_amount(text):
    with pytest.raises(OptionError, match=r"memory: got .*'4GB'"):
        memory_bytes(text)


def test_by_default_it_is_half_of_what_is_free():
    free = memory_bytes(None)
    assert free is None or free > 1e6


KILLED = """
import torch, fxquant, os, signal
from fxquant.passes import held_values
write = held_values.HeldValues._write
def stop(self, *a):
    write(self, *a)
    print("written", flush=True)
    os.kill(os.getpid(), {signal})
held_values.HeldValues._write = stop
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).eval()
fxquant.quantize(model, [torch.randn(8, 64)] * 4, method="gptq", memory="1KB")
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_nothing_behind(tmp_path, sent):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    code = KILLED.format(signal=int(sent))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, timeout=300,
    )  # fmt: skip
    assert b"written" in done.stdout
    assert done.returncode != 0
    assert not list(tmp_path.rglob("fxquant-*"))


def test_a_bad_amount_is_refused_before_anything_runs():
    with pytest.raises(FxquantError, match="memory"):
        fxquant.quantize(models.Plain(), X, memory="lots", **QUIET)


def test_a_stepper_keeps_no_value_that_was_handed_out():
    gm = fxquant.trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.ones(2, 8))
    stepper, values = Stepper(gm, Call.of(torch.ones(2, 8))), {}
    stepper.advance(values, 0, 2)  # the input, the layer
    kept = [weakref.ref(value) for value in values.values()]
    assert kept
    values = None
    assert [ref() for ref in kept] == [None] * len(kept)
