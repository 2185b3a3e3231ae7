"""How results show themselves: a line, a text, an HTML table in notebooks, files."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fxquant.report.tables import filled_columns, format_cell, text_table, write_csv, write_json


class View(ABC):
    """A result with a headline, a table and plain data; the views follow from these."""

    @abstractmethod
    def headline(self) -> str:
        """The result in one line."""

    @abstractmethod
    def columns(self) -> Sequence[str]:
        """The names of the table's columns."""

    @abstractmethod
    def cells(self) -> list[Sequence[Any]]:
        """The table's rows: text, numbers, or None where there is nothing to say."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""

    @abstractmethod
    def records(self) -> list[dict[str, Any]]:
        """The rows as mappings, as CSV files and `pandas.DataFrame` take them."""

    def table(self) -> str:
        """The table as text, without columns that were not measured."""
        return text_table(*filled_columns(self.columns(), self.cells()))

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        write_json(path, self.to_dict())

    def to_csv(self, path: str | Path) -> None:
        """Write the rows as CSV."""
        write_csv(path, self.records())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.headline()}>"

    def __str__(self) -> str:
        return f"{self.headline()}\n{self.table()}" if self.cells() else self.headline()

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        names, cells = filled_columns(self.columns(), self.cells())
        heads = "".join(f"<th>{escape(' '.join(c.split()))}</th>" for c in names)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(format_cell(cell))}</td>" for cell in row) + "</tr>"
            for row in cells
        )
        table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        return f"<p>{escape(self.headline())}</p>{table if rows else ''}"
