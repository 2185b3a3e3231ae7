"""Memory that was freed goes back to the system, and a result is on memory of its own."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph.parameters import memory_of
from fxquant.passes import freed_memory
from fxquant.passes.freed_memory import FreedMemory, give_back_freed, resident_bytes

CHUNK, COUNT = 1 << 14, 4000  # floats, which no library takes apart from the others

knows_memory = pytest.mark.skipif(
    freed_memory._trim() is None or resident_bytes() is None, reason="another C library"
)


@knows_memory
def test_what_lasts_between_what_was_freed_keeps_its_values_and_the_rest_goes_back():
    chunks = [torch.full((CHUNK,), float(i)) for i in range(COUNT)]
    lasting = chunks[::16]
    del chunks
    give_back_freed()
    full = [torch.full((CHUNK,), float(i)) for i in range(COUNT)]
    most = resident_bytes()
    lasting += full[8::16]
    del full
    give_back_freed()
    assert most - resident_bytes() > 0.6 * CHUNK * 4 * COUNT
    assert all(bool((chunk == chunk[0]).all()) for chunk in lasting)
    assert [float(chunk[0]) for chunk in lasting[:3]] == [0.0, 16.0, 32.0]


def test_nothing_is_given_back_before_the_process_has_grown(monkeypatch):
    asked, sizes = [], iter([100, 140, 90, 130, 151, 100, 149])
    monkeypatch.setattr(freed_memory, "MOST_GROWN", 50)
    monkeypatch.setattr(freed_memory, "resident_bytes", lambda: now[0])
    monkeypatch.setattr(freed_memory, "give_back_freed", lambda: asked.append(now[0]))
    now = [next(sizes)]
    freed = FreedMemory()
    for size in sizes:
        now[0] = size
        freed.give_back()
    assert asked == [151]  # 61 more than the least
    bounded = FreedMemory(120)
    now[0] += 31
    bounded.give_back()
    assert asked == [151, now[0]]


def test_a_system_that_does_not_tell_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(freed_memory, "RESIDENT", tmp_path / "missing")
    assert resident_bytes() is None
    FreedMemory().give_back()
    monkeypatch.setattr(freed_memory, "_trim", lambda: None)
    give_back_freed()


class _Tied(nn.Module):
    """A head that reads the weight of the embedding, and a parameter without a layer."""

    def __init__(self, max_norm: float | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(300, 32, max_norm=max_norm)
        self.scale = nn.Parameter(torch.ones(32))
        self.norm = nn.LayerNorm(32)
        self.layer, self.head = nn.Linear(32, 32), nn.Linear(32, 300, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) * self.scale
        return self.head(self.norm(x + self.layer(x)))


class _Counting(_Tied):
    """It writes into what it reads, each time anew."""

    def forward(self, ids):
        self.scale.mul_(2.0)
        return super().forward(ids)


@pytest.mark.parametrize(
    "model", [_Tied, lambda: _Tied(max_norm=2.0), _Counting], ids=["tied", "max_norm", "counting"]
)
@pytest.mark.parametrize("chosen", [["layer"], ["layer", "head"]], ids=["layer", "head"])
@torch.no_grad()
def test_no_result_lies_in_the_memory_of_the_model(model, chosen):
    torch.manual_seed(0)
    model = model().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    batches = list(torch.randint(0, 300, (4, 4, 8)))
    gm, _ = fxquant.quantize(
        model, batches, method="gptq", group_size=32, skip_param_threshold=0,
        layer_types=None, modules_to_not_convert=[n for n in ("head",) if n not in chosen],
        accuracy_warning="ignore",
    )  # fmt: skip
    taken = {memory_of(t) for t in model.state_dict().values()}
    for name, tensor in (*gm.named_parameters(), *gm.named_buffers()):
        assert memory_of(tensor) not in taken, name
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    if chosen == ["layer"]:  # what is tied stays so
        assert len({memory_of(p) for n, p in gm.named_parameters() if p.shape == (300, 32)}) == 1
