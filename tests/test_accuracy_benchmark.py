"""The benchmark of accuracy measures on texts that calibration did not see."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

OTHERS = ["dictionaries", "documentation", "speeches", "source code", "languages"]
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def sources(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("sources")


def test_no_piece_to_measure_on_is_one_of_calibration(sources):
    given = (sources.book_for_calibration(), sources.built_in_text())
    calibration = {piece for source in given for piece in source.pieces(10_000)}
    others = [sources.book_held_out(), *sources.other_sources()]
    assert len({source.name for source in others}) == 6
    for source in others:
        pieces = source.pieces(128)
        assert len(set(pieces)) > 120
        assert not calibration.intersection(pieces)
        assert source.windows(64).shape == (64, 256)


def test_it_prints_the_worst_and_the_mean_of_other_sources(tmp_path):
    path = tmp_path / "rows.json"
    script = BENCHMARKS / "accuracy.py"
    options = [
        "--model",
        "language model",
        "--method",
        "no data: rtn",
        "--pieces",
        "8",
        "--json",
        path,
    ]
    subprocess.run([sys.executable, script, *options], check=True, timeout=300)
    plain, rounded = json.loads(path.read_text())["rows"]
    columns = ["same book", "worst", "mean", *OTHERS, "seconds"]
    assert [*plain] == [*rounded] == ["model", "method", *columns]
    assert {plain[name] for name in columns[:-1]} == {0.0}  # it is what others are compared with
    figures = [rounded[name] for name in OTHERS]
    assert rounded["worst"] == min(figures) < rounded["mean"] < max(figures) < 1
