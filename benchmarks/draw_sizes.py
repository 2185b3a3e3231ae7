"""Draw what `calibration_size.py` measured: accuracy against tokens of calibration, as SVG.

    python benchmarks/calibration_size.py --json sizes.json
    python benchmarks/draw_sizes.py sizes.json --output docs/images/calibration-size.svg

Several files may be given, of one size each, for example. A panel for each model.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import groupby
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 400, 300  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 78, 36, 46  # what lies around its axes
LINES = {"same book": "#1b6ca8", "mean": "#2e8b57", "worst": "#c0392b"}
UNITS = {"minilm": "dB", "language model": "gap closed"}
TICKS = 5  # of the vertical axis, at least
STEPS = (10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)  # between them


def drawing(rows: list[dict[str, Any]]) -> str:
    """The picture.

    Args:
        rows: as `calibration_size.py` writes them, in any order.
    """
    ordered = sorted(rows, key=lambda row: (row["model"], row["tokens"]))
    panels = [list(found) for _, found in groupby(ordered, key=lambda row: row["model"])]
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for place, panel in enumerate(panels):
        parts.append(f'<g transform="translate({WIDTH * place} 0)">')
        parts += _panel(panel)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _panel(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One model's."""
    figures = [row[name] for row in rows for name in LINES]
    lowest, highest = min(figures), max(figures)
    step = next(s for s in STEPS if (highest - lowest) / s >= TICKS - 1 or s == STEPS[-1])
    first, last = floor(lowest / step), ceil(highest / step)
    fewest, most = log10(rows[0]["tokens"]), log10(rows[-1]["tokens"])

    def x(tokens: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (log10(tokens) - fewest) / max(most - fewest, 1e-9)

    def y(figure: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (figure / step - first) / (last - first)

    model = rows[0]["model"]
    yield _text(WIDTH / 2, 20, f"{model}, {UNITS[model]}", "middle", "#222")
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "tokens of calibration", "middle", "#222")
    for number in range(first, last + 1):
        height = y(number * step)
        yield _line([(LEFT, height), (WIDTH - RIGHT, height)], "#ddd", 1)
        yield _text(LEFT - 6, height + 4, f"{number * step:.3g}", "end", "#555")
    for row in rows:
        yield _text(x(row["tokens"]), HEIGHT - BOTTOM + 16, _short(row["tokens"]), "middle", "#555")
    previous = float("-inf")
    for name, colour in sorted(LINES.items(), key=lambda item: y(rows[-1][item[0]])):
        points = [(x(row["tokens"]), y(row[name])) for row in rows]
        yield _line(points, colour, 2)
        for across, down in points:
            yield f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{colour}"/>'
        previous = max(points[-1][1] + 4, previous + 13)  # names do not lie on each other
        yield _text(WIDTH - RIGHT + 8, previous, name, "start", colour)


def _short(tokens: int) -> str:
    return f"{tokens / 1000:.0f} k"


def _line(points: list[tuple[float, float]], colour: str, width: int) -> str:
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _text(across: float, down: float, text: str, anchor: str, colour: str) -> str:
    place = f'x="{across:.1f}" y="{down:.1f}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{text}</text>"


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", type=Path, help="JSON files of calibration_size.py")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [row for path in arguments.rows for row in json.loads(path.read_text())["rows"]]
    arguments.output.write_text(drawing(rows))


if __name__ == "__main__":
    main()
