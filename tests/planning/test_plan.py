"""`plan` predicts what a run takes; the figures are compared with runs."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import fxquant
from fxquant.graph.calls import Call
from fxquant.planning.forecast import Forecast, Step
from fxquant.planning.rehearsal import rehearse

FACTOR = 2.0  # of a prediction of bytes to what is measured, and the other way round


class Attention(nn.Module):
    """Two layers read one value, one reads another; `asks` for values or not."""

    def __init__(self, asks: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(64, 64) for _ in range(3))
        self.asks = asks

    def forward(self, x):
        if self.asks and x.abs().sum().item() < 0:
            return x
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        return x + self.out(scores.softmax(-1) @ x)


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_a_rehearsal_without_values_is_like_one_with_them():
    call = Call.of(torch.randn(2, 16, 64))
    fake, real = (rehearse(m, call, layers(m)) for m in (Attention(), Attention(asks=True)))
    assert [r.layers for r in fake.readings] == [["q", "k"], ["out"]]
    assert [r.tokens for r in fake.readings] == [32, 32]
    given, scores = 2 * 16 * 64 * 4, 2 * 16 * 16 * 4
    assert fake.given == fake.first == fake.readings[0].alive == given
    assert fake.readings[1].alive == 2 * given + scores  # x, the scores, and what `out` reads
    assert fake.flops == 2 * 32 * (3 * 64 * 64 + 2 * 16 * 64)
    assert fake.readings == real.readings
    assert fake.layers_peak == real.layers_peak
    assert rehearse(Attention(asks=True).to("meta"), call, {}) is None


def test_predicted_bytes_are_near_those_of_the_run():
    script = Path(__file__).with_name("peak.py")
    said = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    found = json.loads(said.stdout)
    for name in ("memory", "disk"):
        predicted, measured = found[name]
        assert measured / FACTOR < predicted < measured * FACTOR, (name, found)
    predicted, measured = found["output"]
    assert abs(predicted / measured - 1) < 0.02


def test_less_memory_moves_values_to_the_disk_and_nothing_else():
    model, options = Attention(), {"method": "gptq", "num_calibration_samples": 2000}
    data = [torch.randn(4, 256, 64)] * 500  # small batches: most of the memory is waiting
    plans = [fxquant.plan(model, data=data, memory=m, **options) for m in ("1GB", "100KB")]
    wide, narrow = (plan.forecast for plan in plans)
    assert wide.spilled_bytes == 0 < narrow.spilled_bytes
    assert wide.waiting_bytes == narrow.waiting_bytes == narrow.spilled_bytes + 50_000
    assert narrow.memory_bytes < wide.memory_bytes
    assert narrow.output_bytes == wide.output_bytes
    noisy = fxquant.plan(model, data=data, memory="1GB", token_noise=0.5, **options).forecast
    # Of the 492 batches that are fitted to, a copy of the first in four is fitted to as well.
    assert noisy.waiting_bytes == wide.waiting_bytes * (500 + 123) // 500


def test_a_plan_shows_its_forecast_in_every_view(tmp_path):
    plan = fxquant.plan(Attention(), data=[torch.randn(4, 16, 64)], method="best")
    steps = [step.name for step in plan.forecast.steps]
    assert steps == [
        "tracing", "running batches", "summing moments", "fitting layers", "measuring",
    ]  # fmt: skip
    for text in (str(plan), str(plan.forecast), plan._repr_html_()):
        assert "MB beside the model and the data" in text
        assert "on this machine: tracing" in text
    assert " MB and " in repr(plan)
    plan.to_html(tmp_path / "plan.html")
    assert "for values that wait" in (tmp_path / "plan.html").read_text()
    again = type(plan).from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.forecast == plan.forecast
    assert again.decisions == plan.decisions


def test_what_cannot_be_predicted_is_said():
    plain = fxquant.plan(Attention())
    assert "pass data or example_inputs" in str(plain)
    assert "pass data" in " ".join(
        fxquant.plan(Attention(), example_inputs=torch.randn(1, 4, 64)).lines()
    )
    assert plain.forecast.output_bytes > 0
    scaled = fxquant.plan(Attention(), data=[torch.randn(4, 16, 64)], method="awq")
    assert scaled.forecast.unknown == ["the search of channel scales"]
    nothing = fxquant.plan(Attention(), data=[torch.randn(4, 16, 64)], layer_types=[nn.Linear],
                           modules_to_not_convert=["q", "k", "out"])  # fmt: skip
    assert [step.name for step in nothing.forecast.steps] == ["tracing"]


def test_processes_share_the_steps_that_can_be_shared():
    forecast = Forecast(0, 0, 0, 0, [Step("data", 16.0, 16), Step("rest", 3.0)])
    assert forecast.seconds == 19.0
    assert forecast.seconds_on(4) == 7.0
    assert forecast.seconds_on(64) == 4.0


def test_a_rehearsal_up_to_a_module_does_not_run_what_follows():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(4, 4))
    found = rehearse(model, Call.of(torch.ones(3, 8)), {"last": model[2]}, until="1")
    assert [tuple(t.shape) for t in found.reached.tensors()] == [(3, 16)]
    assert not found.readings
