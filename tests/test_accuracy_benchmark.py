"""The benchmark of accuracy measures on texts that calibration did not see."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import fxquant

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


def test_the_built_in_text_has_no_run_of_characters_that_is_measured_on(sources):
    measured = [sources.book_held_out(), *sources.other_sources()]
    spaced, chinese = _runs("\n".join(source.text() for source in measured))
    shared = {}
    for passage in fxquant.calibration_text(None):
        its_spaced, its_chinese = _runs(passage)
        shared[passage] = (its_spaced & spaced) | (its_chinese & chinese)
    assert not [(passage, *runs) for passage, runs in shared.items() if runs]


def _runs(text: str) -> tuple[set[str], set[str]]:
    """All runs of 40 characters, without case and with single spaces, and of 12 Chinese ones."""
    folded = " ".join(text.casefold().split())
    chinese = re.sub(r"[^\u4e00-\u9fff]", "", text)
    spaced = {folded[i : i + 40] for i in range(len(folded) - 39)}
    return spaced, {chinese[i : i + 12] for i in range(len(chinese) - 11)}


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


def test_a_curve_is_drawn_with_a_panel_for_each_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    drawing = importlib.import_module("draw_sizes").drawing
    rows = [
        {"model": model, "tokens": tokens, "same book": best, "mean": best - 1, "worst": best - 2}
        for model in ("minilm", "language model")
        for tokens, best in ((30_000, 18.0), (1_000, 12.0), (3_000, 15.0))
    ]
    picture = ElementTree.fromstring(drawing(rows))
    svg = "{http://www.w3.org/2000/svg}"
    panels = picture.findall(f"{svg}g")
    titles = [panel.find(f"{svg}text").text for panel in panels]
    assert titles == ["language model, gap closed", "minilm, dB"]
    for panel in panels:
        points = [(float(c.get("cx")), float(c.get("cy"))) for c in panel.findall(f"{svg}circle")]
        assert len(points) == 9
        for line in (points[:3], points[3:6], points[6:]):  # more tokens to the right, best on top
            (left, low), (middle, _), (right, high) = line
            assert left < middle < right
            assert low > high
        words = [text.text for text in panel.findall(f"{svg}text")]
        assert [word for word in words if word in ("same book", "mean", "worst")] == [
            "same book", "mean", "worst"
        ]  # fmt: skip
        assert {"1 k", "3 k", "30 k", "tokens of calibration"} < set(words)
