"""Tokens that an attention mask calls padding are in no figure, as no layer is fitted to them."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph.calls import Call
from fxquant.measure.heldout import hold_out
from fxquant.passes.padding import without_padding

OPTIONS = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}


class Tagger(nn.Module):
    """An embedding and two layers for each token; the mask only says what is padding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 64)
        self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids) * (1 + 30 * (1 - attention_mask.unsqueeze(-1).float()))
        return self.b(torch.tanh(self.a(x)))


def made():
    torch.manual_seed(0)
    return Tagger().eval()


def batches(count=4):
    """Rows of 12 tokens, of which all but 5 are padding; values there are large."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(8, 12, dtype=torch.int64)
    mask[:, 5:] = 0
    return [
        {"input_ids": torch.randint(0, 50, (8, 12), generator=generator), "attention_mask": mask}
        for _ in range(count)
    ]


def cut(batch):
    """The batch without its padding."""
    return {name: value[:, :5] for name, value in batch.items()}


@pytest.mark.parametrize("method", ["rtn", "gptq", "auto"])
def test_the_record_is_that_of_batches_without_padding(method):
    data = batches()
    graph, info = fxquant.quantize(made(), data, method=method, **OPTIONS)
    _, plain = fxquant.quantize(made(), [cut(batch) for batch in data], method=method, **OPTIONS)
    assert info.sqnr_db == pytest.approx(plain.sqnr_db, abs=0.05)
    for row, other in zip(info.rows, plain.rows, strict=True):
        assert row.introduced_sqnr_db == pytest.approx(other.introduced_sqnr_db, abs=0.05)
        assert row.cumulative_sqnr_db == pytest.approx(other.cumulative_sqnr_db, abs=0.05)
    _, held_out = hold_out([Call.of(batch) for batch in data])
    with torch.no_grad():
        pairs = [(made()(**call.kwargs)[:, :5], graph(**call.kwargs)[:, :5]) for call in held_out]
    expected, found = map(torch.cat, zip(*pairs, strict=True))
    assert info.sqnr_db == pytest.approx(fxquant.sqnr_db(expected, found), abs=0.01)


def test_a_mask_may_be_given_by_its_position():
    data = batches()
    _, named = fxquant.quantize(made(), data, method="gptq", **OPTIONS)
    in_order = [tuple(batch.values()) for batch in data]
    _, positional = fxquant.quantize(made(), in_order, method="gptq", **OPTIONS)
    assert positional.sqnr_db == named.sqnr_db


@pytest.mark.parametrize("method", ["local", "exact", "gradient"])
@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_sensitivity_is_that_of_batches_without_padding(method, rounding):
    options = {"method": method, "rounding": rounding, "group_size": 32, "skip_param_threshold": 0}
    data = batches()
    report = fxquant.sensitivity(made(), data, **options)
    plain = fxquant.sensitivity(made(), [cut(batch) for batch in data], **options)
    assert report.output_sqnr_db == pytest.approx(plain.output_sqnr_db, abs=0.05)
    near = 1.5 if method == "gradient" else 0.05  # directions are drawn for each shape
    for row, other in zip(report.rows, plain.rows, strict=True):
        if method != "local":
            assert row.output_sqnr_db == pytest.approx(other.output_sqnr_db, abs=near)
        assert row.introduced_sqnr_db == pytest.approx(other.introduced_sqnr_db, abs=0.05)


def test_a_metric_of_the_callers_gets_whole_outputs():
    seen = set()

    def metric(expected, found):
        seen.add((*expected.shape, *found.shape))
        return 0.0

    fxquant.sensitivity(
        made(), batches(), method="exact", metric=metric, group_size=32, skip_param_threshold=0
    )
    assert {len(shape) for shape in seen} == {6}


def test_values_of_other_tokens_are_whole():
    mask = torch.tensor([[True, True, False]])
    value = torch.randn(1, 3, 4)
    assert without_padding(mask, value)[0].shape == (2, 4)
    assert without_padding(mask, value.flatten(0, 1))[0].shape == (2, 4)
    pooled, odd = torch.randn(1, 4), torch.randn(1, 2, 4)
    for other in (pooled, odd, torch.tensor(1.0)):
        assert without_padding(mask, other)[0] is other
    assert without_padding(None, value)[0] is value
    assert without_padding(torch.ones(1, 3, dtype=torch.bool), value)[0] is value
