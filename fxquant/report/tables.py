"""Text tables and plain files of rows."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate


def format_db(value: float | None) -> str:
    """A decibel figure for a table; nothing where it was not measured."""
    return "" if value is None else f"{value:.1f}"


def format_shape(shape: Sequence[int]) -> str:
    """A shape for a table: `[256, 64]` becomes `256x64`."""
    return "x".join(map(str, shape))


def text_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A text table; columns whose cells are numbers are aligned on the right."""
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=False)


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
