import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import fxquant
from fxquant import GraphDiff, QuantizationInfo, SensitivityReport, TraceReport
from fxquant.report.tables import text_table
from fxquant.report.tables import to_json as as_json


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


@pytest.fixture(scope="module")
def results():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), Branching(), nn.Linear(64, 64))
    data = [torch.randn(32, 64) for _ in range(3)]
    graph = fxquant.trace(model, data[0])
    quantized, info = fxquant.quantize(
        graph, data, group_size=32, skip_param_threshold=0, accuracy_warning="ignore"
    )
    report = fxquant.sensitivity(
        graph, data, method="gradient", group_size=32, skip_param_threshold=0
    )
    infinite = [replace(report.rows[0], output_errors={4: math.inf}), *report.rows[1:]]
    return {
        QuantizationInfo: info,
        SensitivityReport: replace(report, rows=infinite),
        GraphDiff: fxquant.diff(graph, quantized),
        TraceReport: fxquant.trace_report(graph),
    }


KINDS = [QuantizationInfo, SensitivityReport, GraphDiff, TraceReport]


@pytest.mark.parametrize("kind", KINDS)
def test_repr_is_one_line_and_str_a_text(results, kind):
    result = results[kind]
    assert type(result) is kind
    assert repr(result).startswith(f"<{kind.__name__}: ")
    assert len(repr(result)) < 300
    assert "\n" not in repr(result)
    assert len(str(result).splitlines()) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_notebook_shows_every_cell_as_text(results, kind):
    result = results[kind]
    html = result._repr_html_()
    assert html.count("<tr>") == 1 + len(result.cells())
    assert "<Sequential" not in html


@pytest.mark.parametrize("kind", KINDS)
def test_plain_data_comes_back_also_through_json(results, kind, tmp_path):
    result = results[kind]
    for data in (result.to_dict(), json.loads(as_json(result.to_dict()))):
        back = kind.from_dict(data)
        assert as_json(back.to_dict()) == as_json(result.to_dict())
    result.to_json(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(as_json(result.to_dict()))


@pytest.mark.parametrize("kind", KINDS)
def test_records_have_equal_keys_and_make_a_csv_file(results, kind, tmp_path):
    records = results[kind].records()
    assert records
    assert len({tuple(record) for record in records}) == 1
    results[kind].to_csv(tmp_path / "r.csv")
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 1 + len(records)


def test_a_page_of_a_quantization_tells_the_sizes(results, tmp_path):
    info = results[QuantizationInfo]
    info.to_html(tmp_path / "page.html")
    assert f"{info.original_size_mb:.2f} -> {info.quantized_size_mb:.2f} MB" in (
        tmp_path / "page.html"
    ).read_text().replace("\\u003e", ">")


def test_a_table_prints_what_it_was_given():
    text = text_table(("module", "dB", "count"), [("1e5", "34.0", 7), ("nan", "9.50", None)])
    first, second = text.splitlines()[2:]
    assert first.split() == ["1e5", "34.0", "7"]
    assert second.split() == ["nan", "9.50"]
    assert first.startswith("1e5")
    assert first.index("34.0") + len("34.0") == len(second), "figures are aligned on the right"
