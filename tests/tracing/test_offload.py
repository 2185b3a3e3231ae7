"""Models that accelerate offloads give what they give without; on meta they are refused."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

import fxquant
from fxquant.config import memory
from fxquant.errors import OptionError, WeightError
from tests.models import WIDTH

QUIET = {"group_size": 16, "accuracy_warning": "ignore", "skip_param_threshold": 0}


class Tied(nn.Module):
    """An embedding whose weight is the head's, and a forward that was set on an instance."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, WIDTH)
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.BatchNorm1d(WIDTH))
        self.head = nn.Linear(WIDTH, 40, bias=False)
        self.tie_weights()
        self.inner[1].forward = torch.tanh

    def tie_weights(self):
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.inner(self.table(ids)))


def tied():
    torch.manual_seed(0)
    return Tied().eval()


@pytest.fixture(params=["cpu", "disk"])
def offloaded(request, tmp_path):
    model = tied()
    if request.param == "cpu":
        return cpu_offload(model, execution_device="cpu")
    return disk_offload(model, tmp_path, execution_device="cpu")


def data():
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(40, (4, 24), generator=generator))


def test_the_result_is_that_of_the_model_without_offload(offloaded):
    assert offloaded.head.weight.is_meta
    plain, info = fxquant.quantize(tied(), data(), method="gptq", **QUIET)
    found, other = fxquant.quantize(offloaded, data(), method="gptq", **QUIET)
    assert other.sqnr_db == info.sqnr_db
    assert [str(d) for d in other.decisions] == [str(d) for d in info.decisions]
    assert torch.equal(found(data()[0]), plain(data()[0]))


def test_the_model_stays_offloaded_and_runs(offloaded):
    before = offloaded(data()[0])
    gm = fxquant.trace(offloaded, data()[0])
    assert torch.equal(gm(data()[0]), before)
    assert offloaded.head.weight.is_meta
    assert torch.equal(offloaded(data()[0]), before)


def test_a_swapped_copy_has_the_values(offloaded):
    model, _ = fxquant.quantize(offloaded, data(), into="model", **QUIET)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.isfinite(model(data()[0])).all()


def test_more_on_a_disk_than_is_free_is_refused_in_words(tmp_path, monkeypatch):
    model = disk_offload(tied(), tmp_path, execution_device="cpu")
    info = tmp_path / "meminfo"
    info.write_text("MemAvailable: 0 kB\n")
    monkeypatch.setattr(memory, "MEMORY_INFO", info)
    with pytest.raises(OptionError, match="offloaded weights on a disk.*quantize_checkpoint"):
        fxquant.quantize(model, data(), **QUIET)


def test_a_model_on_meta_is_refused_in_words_whatever_its_code_asks_of_values():
    class Asking(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 + self.weight.abs().max().item())

    with torch.device("meta"):
        model = Asking(WIDTH, WIDTH).eval()
    with pytest.raises(WeightError, match="weight: .*meta device.*quantize_checkpoint"):
        fxquant.quantize(model, [torch.ones(2, WIDTH)] * 2, **QUIET)
