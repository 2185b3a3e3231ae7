"""`draw`: a graph as a `.dot`, `.svg` or `.html` file."""

from pathlib import Path

from torch.fx import GraphModule

from fxquant.errors import OptionError, check_path
from fxquant.measure.quantization_info import INFO_KEY
from fxquant.report.atomic import write_text
from fxquant.report.drawing import to_dot, to_svg
from fxquant.report.folding import fold_repeats
from fxquant.report.html import write_html
from fxquant.report.pages import decisions_page
from fxquant.view.graph_view import to_networkx


def draw(gm: GraphModule, path: str | Path) -> None:
    """Draw any traced, observed or rewritten graph.

    Args:
        gm: the graph; figures come from the record it carries.
        path: `.dot` for Graphviz, `.svg` for a picture, `.html` for a page to explore. In `.svg`
            and `.html` repeated blocks are folded.

    Raises:
        OptionError: the file name ends in something else.
        SaveError: the file cannot be written.
    """
    check_path("path", path)
    path = Path(path)
    graph = to_networkx(gm)
    if path.suffix == ".dot":
        write_text(path, to_dot(graph))
    elif path.suffix == ".svg":
        write_text(path, to_svg(fold_repeats(graph)))
    elif path.suffix == ".html":
        record = gm.meta.get(INFO_KEY) or {}
        decisions, rows = record.get("decisions", []), record.get("rows", [])
        write_html(
            path,
            decisions_page(f"{type(gm).__name__}: graph and decisions", decisions, rows, graph),
        )
    else:
        raise OptionError(
            str(path),
            found=f"the ending {path.suffix!r}",
            needed="'.dot', '.svg' or '.html'",
            remedy="Choose one of these endings.",
        )
