"""How many rows calibration draws from data that goes on: by their number, or by their tokens."""

import itertools

import pytest
import torch
from torch import nn

import fxquant
from fxquant.passes.calibration_data import drawn_calls

LONG, SHORT = 256, 12  # tokens of a row


class Recorded:
    """Batches without end, and how many were drawn."""

    def __init__(self, batch: object) -> None:
        self.batch, self.drawn = batch, 0

    def __iter__(self):
        for _ in itertools.count():
            self.drawn += 1
            yield self.batch


def rows_of(data: Recorded, samples: int | None = None) -> int:
    found = drawn_calls(data, nn.Identity(), samples)
    assert data.drawn == len(found)  # nothing is drawn that is not used
    return sum(call.row_count for call in found)


@pytest.mark.parametrize("rows_a_batch", [1, 7, 50, 200])
@pytest.mark.parametrize(
    ("row", "rows"),
    [
        (torch.ones(3, 8, 8), 150),  # a picture
        (torch.ones(SHORT), 150),  # features
        (torch.ones(LONG, dtype=torch.long), 150),  # 38,400 tokens
        (torch.ones(SHORT, dtype=torch.long), 2_500),
        (torch.ones(SHORT, dtype=torch.int32), 2_500),
    ],
)
def test_short_texts_are_drawn_until_they_have_as_many_tokens_as_long_ones(rows_a_batch, row, rows):
    batch = row.expand(rows_a_batch, *row.shape)
    assert rows_of(Recorded(batch)) == rows
    assert rows_of(Recorded(batch), 30) == 30


class Masked(nn.Module):
    def forward(self, input_ids, attention_mask):
        return input_ids * attention_mask


def test_padding_is_no_token():
    ids = torch.ones(10, 40, dtype=torch.long)
    mask = (torch.arange(40) < 20).expand(10, 40).long()
    data = Recorded({"input_ids": ids, "attention_mask": mask})
    found = drawn_calls(data, Masked())
    assert sum(call.row_count for call in found) == 30_000 // 20


def test_rows_of_nothing_but_padding_do_not_go_on_for_ever():
    ids = torch.zeros(500, 4, dtype=torch.long)
    data = Recorded({"input_ids": ids, "attention_mask": ids})
    assert sum(call.row_count for call in drawn_calls(data, Masked())) == 30_000


def test_data_that_end_before_are_used_whole():
    batches = [torch.ones(4, SHORT, dtype=torch.long)] * 3
    assert [call.row_count for call in drawn_calls(batches, nn.Identity())] == [4, 4, 4]


def test_the_default_is_kept_by_a_config_and_used_by_quantize():
    config = fxquant.QuantConfig(method="rtn", accuracy_warning="ignore")
    assert fxquant.QuantConfig.from_dict(config.to_dict()) == config
    assert config.num_calibration_samples is None
    model = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 64))
    texts = [torch.randint(20, (100, SHORT)) for _ in range(30)]
    _, info = fxquant.quantize(model, texts, config=config)
    assert info.calibration_samples_used == 2_500
    assert fxquant.QuantizationInfo.from_dict(info.to_dict()).config == config
