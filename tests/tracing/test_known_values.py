"""A check by value becomes a check of the graph; a branch on values stays the model's own."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import TraceError

W = 8


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)
        self.table = nn.Parameter(torch.randn(64, W))


class Refuses(Layers):
    def forward(self, x):
        if torch.isnan(x).any():
            raise ValueError("not a number")
        h = self.first(x)
        assert h.abs().max() < 100, "too large"
        return self.second(h)


class AsksForPositions(Layers):
    """The answer is the same for all inputs; whoever exports is told nothing, though."""

    def forward(self, x):
        gaps = torch.arange(x.shape[1]).diff(prepend=torch.tensor([-1]))
        is_fake = isinstance(gaps, torch._subclasses.FakeTensor)
        if not is_fake and (gaps == 1).all():
            return self.first(x)
        return self.second(x)


class Branches(Layers):
    def forward(self, x):
        return self.first(x) if x.mean() > -1e3 else self.second(x)


class CountsHits(Layers):
    def forward(self, x):
        return self.first(x) if x.flatten().nonzero().shape[0] > 2 else self.second(x)


class ComparesANumber(Layers):
    def forward(self, x):
        if float(x.abs().max()) > 1e3:
            raise ValueError("too large")
        return self.second(self.first(x))


class RefusesBothOnly(Layers):
    def forward(self, x):
        if x.mean() > -1e3 and x.mean() > 1e3:
            raise ValueError("too large")
        return self.second(self.first(x))


class CutsATable(Layers):
    """A slice whose ends are numbers in tensors."""

    def forward(self, x):
        span = torch.tensor(x.shape[1]).clamp(max=32)
        return self.second(self.first(x) + self.table[32 - span : 32 - span + x.shape[1]])


class MarksMayBeMore(Layers):
    """A mask of zeros and ones has one meaning, one with large numbers another."""

    def forward(self, x, mask):
        h = self.first(x)
        if (mask > 5).any():
            h = h + self.second(h.mean(1, keepdim=True))
        if x.shape[1] % 4:
            h = nn.functional.pad(h, (0, 0, 0, 4 - x.shape[1] % 4))
        return (self.second(h)[:, : x.shape[1]]) * mask[..., None]


class MarkedTokens(Layers):
    """Tokens that are marked by a two go through a layer of their own; mostly there are none."""

    def forward(self, x, mask):
        h, is_marked = self.first(x), mask > 1
        if is_marked.any():
            places = is_marked.nonzero(as_tuple=True)
            h[places] = self.second(x[places]).view(len(places[0]), -1)
        return h * (mask > 0)[..., None]


class MarksAddAMean(Layers):
    def forward(self, x, mask):
        h = self.first(x)
        if (mask > 1).any():
            h = h + self.second(h.mean(1, keepdim=True))
        return self.second(h)


class RoutesRows(Layers):
    """The rows of each kind go to a layer, unless there are none."""

    def forward(self, x):
        kind, out = (x.sum((1, 2)) > 0).long(), torch.zeros_like(x)
        for number, layer in enumerate((self.first, self.second)):
            rows = (kind == number).nonzero().squeeze(-1)
            if rows.numel():
                out.index_add_(0, rows, layer(x[rows]))
        return out


class PadsAndCuts(Layers):
    """Lengths are padded to multiples of four, and cut again where something was padded."""

    def forward(self, x):
        missing = (4 - x.shape[1] % 4) % 4
        if missing > 0:
            x = nn.functional.pad(x, (0, 0, 0, missing))
        n, t, _ = x.shape
        h = self.first(x).view(n, t // 4, 4, W)
        h = self.second((h + h.mean(2, keepdim=True)).view(n, t, W))
        return h[:, :-missing] if missing > 0 else h


class PaddingIsAnotherWay(Layers):
    def forward(self, x, mask):
        return self.first(x) if mask.all() else self.second(x * mask[..., None])


class OneTokenIsAnotherWay(Layers):
    def forward(self, tokens):
        x = self.table[tokens]
        return self.second(x) if (tokens[:, 0] == 3).all() else self.first(x)


def traced(cls):
    torch.manual_seed(0)
    model = cls().eval()
    gm = fxquant.trace(model, torch.randn(2, 5, W))
    other = torch.randn(3, 7, W)
    torch.testing.assert_close(gm(other), model(other))
    return gm


@pytest.mark.parametrize("cls", [Refuses, AsksForPositions, CutsATable])
def test_what_holds_for_all_inputs_is_one_graph_that_can_be_saved(cls, tmp_path):
    gm = traced(cls)
    assert not fxquant.trace_report(gm).opaque
    fxquant.save_model(gm, tmp_path / "model.fxq")
    x = torch.randn(2, 6, W)
    assert torch.equal(fxquant.load_model(tmp_path / "model.fxq")(x), gm(x))


@pytest.mark.parametrize(
    ("value", "code"), [(float("nan"), "if torch.isnan"), (1e5, "assert h.abs")]
)
def test_what_the_model_refuses_the_graph_refuses_in_words(value, code):
    with pytest.raises(TraceError, match=rf"line \d+ of test_known_values.py: .*{code}"):
        traced(Refuses)(torch.full((2, 5, W), value))


@pytest.mark.parametrize("cls", [Branches, CountsHits, ComparesANumber, RefusesBothOnly])
def test_a_branch_that_other_inputs_may_take_stays_the_models_own(cls):
    assert fxquant.trace_report(traced(cls)).opaque


@pytest.mark.parametrize("length", [5, 8])
def test_a_branch_that_no_tried_value_turns_is_a_check_of_the_graph(tmp_path, length):
    torch.manual_seed(0)
    model = MarksMayBeMore().eval()
    x, mask = torch.randn(2, length, W), torch.ones(2, length, dtype=torch.long)
    gm = fxquant.trace(model, {"x": x, "mask": mask})
    assert not fxquant.trace_report(gm).opaque
    assert "if (mask > 5).any()" in fxquant.trace_report(gm).refused[0]
    fxquant.save_model(gm, tmp_path / "model.fxq")
    loaded = fxquant.load_model(tmp_path / "model.fxq")
    for size in (1, 4, 7, 12):
        x, mask = torch.randn(3, size, W), torch.ones(3, size, dtype=torch.long)
        mask[0, size // 2 :] = 0
        torch.testing.assert_close(loaded(x, mask), model(x, mask))
    mask[1, 0] = 6
    with pytest.raises(TraceError, match=r"values for which .*if \(mask > 5\).any"):
        loaded(x, mask)


def check_saved(gm, model, path, calls):
    """A file of the graph computes what the model computes."""
    fxquant.save_model(gm, path)
    loaded = fxquant.load_model(path)
    with torch.no_grad():
        for call in calls:
            torch.testing.assert_close(loaded(*call), model(*call))


def test_a_graph_of_one_way_that_is_right_for_the_other_too_holds_both(tmp_path):
    torch.manual_seed(0)
    model, mask = MarkedTokens().eval(), torch.ones(2, 5, dtype=torch.long)
    gm = fxquant.trace(model, {"x": torch.randn(2, 5, W), "mask": mask})
    report = fxquant.trace_report(gm)
    assert not report.opaque
    assert not report.refused
    assert {"first", "second"} <= {name for name, _ in gm.named_modules()}
    one, some = mask.clone(), torch.tensor([[2, 1, 1, 0, 0, 0], [2, 2, 1, 2, 1, 0]])
    one[0, 3] = 2
    calls = [(torch.randn(*m.shape, W), m) for m in (mask, one, some, some[:, :1], some * 0)]
    check_saved(gm, model, tmp_path / "model.fxq", calls)


def test_each_row_alone_shows_that_a_layer_without_rows_is_no_other_way(tmp_path):
    torch.manual_seed(0)
    model, x = RoutesRows().eval(), torch.randn(6, 5, W)
    gm = fxquant.trace(model, x)
    assert not fxquant.trace_report(gm).opaque
    assert not fxquant.trace_report(gm).refused
    calls = [(x,), (x.abs(),), (-x.abs(),), (x[:1],), (x[1:2],)]
    check_saved(gm, model, tmp_path / "model.fxq", calls)


def test_what_is_padded_and_cut_again_is_one_graph_for_all_lengths(tmp_path):
    torch.manual_seed(0)
    model = PadsAndCuts().eval()
    gm = fxquant.trace(model, torch.randn(2, 6, W))
    assert not fxquant.trace_report(gm).opaque
    assert not fxquant.trace_report(gm).refused
    calls = [(torch.randn(3, length, W),) for length in (1, 3, 4, 5, 8, 11)]
    check_saved(gm, model, tmp_path / "model.fxq", calls)


def test_a_branch_that_marks_turn_to_other_values_stays_the_models_own():
    torch.manual_seed(0)
    mask = torch.ones(2, 5, dtype=torch.long)
    model = MarksAddAMean().eval()
    gm = fxquant.trace(model, {"x": torch.randn(2, 5, W), "mask": mask})
    report, x = fxquant.trace_report(gm), torch.randn(2, 5, W)
    assert report.opaque
    assert "a mask with twos takes another way" in str(report.attempts)
    mask[0, 0] = 2
    torch.testing.assert_close(gm(x, mask), model(x, mask))


def test_a_branch_that_padding_turns_stays_the_models_own():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 5, W), "mask": torch.ones(2, 5, dtype=torch.long)}
    report = fxquant.trace_report(fxquant.trace(PaddingIsAnotherWay().eval(), inputs))
    assert report.opaque
    assert "padding on the right takes another way" in str(report.attempts)


def test_a_branch_that_other_tokens_turn_stays_the_models_own():
    torch.manual_seed(0)
    tokens = torch.randint(4, 64, (2, 5))
    report = fxquant.trace_report(fxquant.trace(OneTokenIsAnotherWay().eval(), tokens))
    assert report.opaque


def test_a_branch_with_a_layer_of_its_own_stays_the_models_own():
    class Rare(Layers):
        def forward(self, x):
            x = self.first(x)
            return self.second(x) if x.abs().max() > 1e9 else x

    model = Rare().eval()
    gm = fxquant.trace(model, torch.randn(2, 5, W))
    report = fxquant.trace_report(gm)
    assert report.opaque
    assert "layer second runs only there" in str(report.attempts)
    large = torch.full((2, 5, W), 1e12)
    assert torch.equal(gm(large), model(large))
