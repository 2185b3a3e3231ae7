"""Text tables and plain files of rows."""

import csv
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

SPACING = 2  # between columns
NARROWEST = 12  # no column is wrapped to less


def format_db(value: float | None) -> str:
    """A decibel figure for a table; nothing where it was not measured."""
    return "" if value is None else f"{value:.1f}"


def format_shape(shape: Sequence[int]) -> str:
    """A shape for a table: `[256, 64]` becomes `256x64`."""
    return "x".join(map(str, shape))


def text_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A text table; columns whose cells are numbers are aligned on the right.

    On a terminal it fits its width: the widest columns of text are wrapped. Elsewhere it does not
    wrap, so that every row is one line.
    """
    options: dict[str, Any] = {"headers": headers, "tablefmt": "simple"}
    columns = terminal_columns()
    widths = [
        max([len(str(row[i])) for row in rows] + [len(line) for line in head.split("\n")])
        for i, head in enumerate(headers)
    ]
    if columns is None or sum(widths) + SPACING * len(widths) <= columns:
        return tabulate(rows, **options)
    while sum(widths) + SPACING * len(widths) > columns and max(widths) > NARROWEST:
        widths[widths.index(max(widths))] -= 1
    return tabulate(rows, maxcolwidths=widths, **options)


def terminal_columns() -> int | None:
    """The width of the terminal, or None where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def plain(value: Any) -> Any:
    """`value` for JSON: infinite and undefined numbers become text, tuples become lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def to_json(data: Any) -> str:
    """`data` as indented JSON."""
    return json.dumps(plain(data), indent=2)


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as JSON."""
    Path(path).write_text(to_json(data) + "\n", encoding="utf-8")


def write_csv(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of equal keys as CSV with a header."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
