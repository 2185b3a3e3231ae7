"""Text tables and plain files of rows."""

import csv
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxquant.report.atomic import write_text

SPACING = 2  # between columns
HEADER_PADDING = 2  # tabulate makes a column at least this much wider than its header
FIGURE = re.compile(r"-?(\d+\.\d+|inf|nan)")
NARROWEST = 12  # no column is wrapped to less


def format_db(value: float | None) -> str:
    """A decibel figure for a table; nothing where it was not measured."""
    return "" if value is None else f"{value:.1f}"


def format_shape(shape: Sequence[int]) -> str:
    """A shape for a table: `[256, 64]` becomes `256x64`."""
    return "x".join(map(str, shape))


def format_cell(value: Any) -> str:
    """A cell of a table as text: a number as it is, nothing for None."""
    return "" if value is None else str(value)


def filled_columns(
    names: Sequence[str], rows: Sequence[Sequence[Any]]
) -> tuple[list[str], list[list[Any]]]:
    """All columns but those with None in every row, which were not measured."""
    filled = [i for i in range(len(names)) if any(row[i] is not None for row in rows)]
    kept = filled if rows else range(len(names))
    return [names[i] for i in kept], [[row[i] for i in kept] for row in rows]


def text_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A text table; columns whose cells are numbers are aligned on the right.

    Cells are printed as they are: text that looks like a number ("34.0", or a module called "1e5")
    is not read as one.

    On a terminal it fits its width: the widest columns of text are wrapped. Elsewhere it does not
    wrap, so that every row is one line.
    """
    texts = [[format_cell(cell) for cell in row] for row in rows]
    options: dict[str, Any] = {
        "headers": headers,
        "tablefmt": "simple",
        "disable_numparse": True,
        "colalign": [_alignment([row[i] for row in rows]) for i in range(len(headers))],
    }
    if not rows:
        del options["colalign"]
    columns = terminal_columns()
    widths = [
        max(
            [len(row[i]) for row in texts]
            + [len(line) + HEADER_PADDING for line in head.split("\n")]
        )
        for i, head in enumerate(headers)
    ]
    if columns is None or sum(widths) + SPACING * len(widths) <= columns:
        return tabulate(texts, **options)
    while sum(widths) + SPACING * len(widths) > columns and max(widths) > NARROWEST:
        widths[widths.index(max(widths))] -= 1
    return tabulate(texts, maxcolwidths=widths, **options)


def _alignment(cells: Sequence[Any]) -> str:
    """On the right for numbers, and for figures that were formatted as text such as "34.0"."""
    shown = [cell for cell in cells if cell not in (None, "")]
    return "right" if shown and all(map(_is_figure, shown)) else "left"


def _is_figure(cell: Any) -> bool:
    return isinstance(cell, int | float) or FIGURE.fullmatch(str(cell)) is not None


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
    """Write `data` as JSON, at once or not at all; a `SaveError` says why not."""
    write_text(path, to_json(data) + "\n")


def write_csv(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of equal keys as CSV with a header, as `write_json` writes."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, file.getvalue())
