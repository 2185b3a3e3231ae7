"""One self-contained HTML page: bars, decisions, Pareto curve and graph; no network is needed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import networkx as nx

from fxquant.report.atomic import write_text
from fxquant.report.drawing import to_svg
from fxquant.report.folding import fold_repeats
from fxquant.report.tables import plain


@dataclass(frozen=True)
class Page:
    """What a page shows; empty parts are left out.

    Attributes:
        title: the heading.
        summary: a line below it.
        table_title: the heading of the table.
        heads: the table's column names.
        rows: its rows; numbers sort as numbers.
        bars: `(module, SQNR in dB)`, worst first.
        pareto: `(average bits, predicted SQNR in dB)`.
        graph: what to draw; repeated blocks are folded.
        extra: further facts of a node, by its name, shown when it is clicked.
    """

    title: str
    summary: str = ""
    table_title: str = "Layers"
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    bars: Sequence[tuple[str, float]] = ()
    pareto: Sequence[tuple[float, float]] = ()
    graph: "nx.MultiDiGraph[str] | None" = None
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)


def write_html(path: str | Path, page: Page) -> None:
    """Write the page to `path`, at once or not at all; a `SaveError` says why not."""
    write_text(path, render(page))


def render(page: Page) -> str:
    """The page as text."""
    svg, nodes = "", {}
    if page.graph is not None:
        folded = fold_repeats(page.graph)
        svg = to_svg(folded)
        nodes = {
            name: {"node": name, **facts, **page.extra.get(str(facts.get("module")), {})}
            for name, facts in folded.nodes(data=True)
        }
    data = {
        "title": page.title,
        "summary": page.summary,
        "table": {"title": page.table_title, "heads": page.heads, "rows": page.rows},
        "bars": [{"module": m, "db": db} for m, db in page.bars],
        "pareto": [{"bits": bits, "db": db} for bits, db in page.pareto],
        "nodes": nodes,
    }
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # "<" would let a name close the script element.
    encoded = json.dumps(plain(data)).replace("<", "\\u003c")
    before, between = template.split("__SVG__")
    middle, after = between.split("__DATA__")
    return "".join((before, svg, middle, encoded, after))
