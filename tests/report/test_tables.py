import pytest

from fxquant.report import tables

HEADS = ("module", "params", "weight\ndB", "why")
ROWS = [
    ("encoder.layer.11.attention.output.dense", 147840, "20.1", "Linear layer, 4 bits by default"),
    (
        "encoder.layer.11.output.LayerNorm",
        768,
        "",
        "type is skipped (default: skip_types: LayerNorm)",
    ),
]


@pytest.mark.parametrize("columns", range(58, 101))
def test_a_table_fits_the_terminal_and_loses_nothing(monkeypatch, columns):
    monkeypatch.setattr(tables, "terminal_columns", lambda: columns)
    text = tables.text_table(HEADS, ROWS)
    assert max(map(len, text.splitlines())) <= columns
    letters = "".join(text.split())
    assert "147840" in letters
    assert letters.count("LayerNorm") <= 2
    for word in ("skipped", "Linear", "20.1"):
        assert word in text


def test_elsewhere_every_row_is_one_line():
    lines = tables.text_table(HEADS, ROWS).splitlines()
    assert len(lines) == 2 + 1 + len(ROWS)
    assert all(row[0] in line and row[3] in line for row, line in zip(ROWS, lines[3:], strict=True))
