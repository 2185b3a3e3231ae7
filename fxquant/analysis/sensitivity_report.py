"""The per-node table of what quantization costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fxquant.analysis.flow import NodeFlow
from fxquant.measure.sensitivity_row import SensitivityRow, as_number
from fxquant.report.html import write_html
from fxquant.report.pages import decisions_page
from fxquant.report.tables import format_db, format_shape, text_table
from fxquant.report.view import View

SENSITIVITY_HEADERS = (
    "module", "type", "shape", "params", "bits",
    "weight\ndB", "introduced\ndB", "cumulative\ndB", "output\ndB", "warning",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class SensitivityReport(View):
    """What quantizing each node costs.

    Attributes:
        rows: one for each quantizable node, in the order of the graph.
        method: how it was measured.
        output_sqnr_db: of the model's output with all nodes quantized.
        rounding: the method that made the quantized layers.
        samples: rows of data that were used.
        heldout_samples: those of them that all figures were measured on, and that did not choose
            the integers; 0 where there were too few to hold any out.
        warning_threshold: below it, in dB, a node is `low`.
        error_threshold: below it, a node is `critical`.
        metric: of the output's error: `"sqnr"`, `"kl"` or `"custom"`.
        flows: how error flows through every node (method `"local"`).
        evaluate: measures the output SQNR of given bits by name; None in a report without model.
        evaluate_error: measures the output's error in the report's metric, smaller is better.
        decisions: the decisions, as plain data.
        graph: of the quantized model, for drawing.
        pareto: predicted `(average bits, output SQNR in dB)`, where the output was measured.
        other_bytes: of a file, for everything but the layers of `rows`.
        peak_bytes: the most bytes of activations that were held (method `"exact"`).
    """

    rows: Sequence[SensitivityRow]
    method: str
    output_sqnr_db: float | None
    warning_threshold: float = 20.0
    error_threshold: float = 10.0
    metric: str = "sqnr"
    flows: Sequence[NodeFlow] = ()
    evaluate: Callable[[dict[str, int]], float] | None = field(default=None, compare=False)
    evaluate_error: Callable[[dict[str, int]], float] | None = field(default=None, compare=False)
    peak_bytes: int | None = None
    decisions: Sequence[dict[str, Any]] = ()
    graph: Any = field(default=None, compare=False)
    pareto: Sequence[tuple[float, float]] = ()
    rounding: str = "rtn"
    samples: int = 0
    heldout_samples: int = 0
    other_bytes: int = 0

    def headline(self) -> str:
        """What was measured and how, in one line."""
        output = "not measured" if self.output_sqnr_db is None else f"{self.output_sqnr_db:.1f} dB"
        return (
            f"{len(self.rows)} layers, method {self.method!r}, output SQNR {output} with all of "
            f"them quantized; {self.how_measured}"
        )

    def columns(self) -> Sequence[str]:
        """The columns of the table."""
        return SENSITIVITY_HEADERS

    def cells(self) -> list[Sequence[Any]]:
        """One row for each layer that can be quantized."""
        return [_cells(row, self.warning_threshold, self.error_threshold) for row in self.rows]

    def records(self) -> list[dict[str, Any]]:
        """The rows as mappings of equal keys."""
        return [{**asdict(r), "shape": format_shape(r.shape)} for r in self.rows]

    def table(self) -> str:
        """The rows as text, and under them how they were measured."""
        return f"{super().table()}\n{self.how_measured}"

    def __str__(self) -> str:
        return self.table()

    @property
    def how_measured(self) -> str:
        """In words: which layers were measured, and on what data."""
        layers = f"layers made by {self.rounding} from {self.samples - self.heldout_samples} rows"
        if self.heldout_samples:
            return f"{layers}, measured on {self.heldout_samples} rows held out"
        return f"{layers}, measured on the same rows: pass more data to hold some out"

    def flow_table(self) -> str:
        """How error flows: each node's SQNR, its gain, and at joins where the error came from."""
        cells = [
            (
                flow.node,
                flow.kind,
                format_db(flow.sqnr_db),
                format_db(flow.gain_db),
                ", ".join(f"{share:.0%} {name}" for name, share in flow.shares.items()),
            )
            for flow in self.flows
            if flow.gain_db is not None
        ]
        return text_table(("node", "op", "SQNR dB", "gain dB", "error came from"), cells)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "method": self.method,
            "metric": self.metric,
            "output_sqnr_db": self.output_sqnr_db,
            "rounding": self.rounding,
            "samples": self.samples,
            "heldout_samples": self.heldout_samples,
            "other_bytes": self.other_bytes,
            "rows": [asdict(row) for row in self.rows],
            "flows": [asdict(flow) for flow in self.flows],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SensitivityReport":
        """Undo `to_dict`, also after JSON; graph and model are not part of it."""
        rows = [SensitivityRow.from_dict(row) for row in data["rows"]]
        flows = [NodeFlow(**flow) for flow in data.get("flows", ())]
        names = ("method", "metric", "rounding", "samples", "heldout_samples", "other_bytes")
        kept = {name: data[name] for name in names if name in data}
        output = as_number(data.get("output_sqnr_db"))
        return cls(rows=rows, flows=flows, output_sqnr_db=output, **kept)

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page: bars, decisions, Pareto curve and graph."""
        rows = [asdict(row) for row in self.rows]
        title = f"Sensitivity ({self.method})"
        write_html(path, decisions_page(title, self.decisions, rows, self.graph, self.pareto))


def _cells(row: SensitivityRow, warning_threshold: float, error_threshold: float) -> Sequence[Any]:
    return (
        row.module,
        row.kind,
        format_shape(row.shape),
        row.params,
        row.bits,
        format_db(row.weight_sqnr_db),
        format_db(row.introduced_sqnr_db),
        format_db(row.cumulative_sqnr_db),
        format_db(row.output_sqnr_db),
        row.severity(warning_threshold, error_threshold),
    )
