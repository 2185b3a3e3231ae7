"""Which way a model was traced, what is opaque and why, and how much weight is in the graph."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.fx import GraphModule

from fxquant.errors import OptionError
from fxquant.graph.graph_module import check_graph
from fxquant.report.view import View
from fxquant.tracing.bare_parameters import BareParameter

REPORT_KEY = "fxquant_trace_report"


@dataclass(frozen=True)
class OpaqueModule:
    """A module that keeps its own Python code; its layers are swapped inside it.

    Attributes:
        module: the user's name.
        type: its class.
        reason: why it could not be traced.
        classes: the classes, of no library that fxquant knows, that `save_model` and `load_model`
            must be told to save it.
    """

    module: str
    type: str
    reason: str
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class TraceReport(View):
    """What tracing did.

    Attributes:
        way: `"symbolic"`, `"export"` or `"opaque"`.
        verified: on how many calls the graph was compared with the model; 0 without example inputs.
        attempts: why better ways were not taken, one line each.
        opaque: each opaque module with the reason.
        unreached: linear layers of the model that the graph does not call.
        read_only: layers whose weight other code than their own multiplies with.
        bare: those of them whose weight is one parameter as it is, by the layer's name.
        without_bias: layers without a bias of which the model's code asks whether they have one, so
            that a quantized one gets none.
        left_out: outputs that a graph cannot hold.
        refused: sizes that the model takes and the graph refuses, with the reason, and the places
            where other values than any that were tried would go a way that the graph refuses.
        product_elements: elements of all parameters that are factors of a product, by kind; tied
            ones count once.
        traced_elements: those of them that the graph can see, by kind.
    """

    way: str
    verified: int = 0
    attempts: list[str] = field(default_factory=list)
    opaque: list[OpaqueModule] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    read_only: list[str] = field(default_factory=list)
    bare: dict[str, BareParameter] = field(default_factory=dict)
    without_bias: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    product_elements: dict[str, int] = field(default_factory=dict)
    traced_elements: dict[str, int] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """The share of all product weight that the graph can see, 0..1."""
        total = sum(self.product_elements.values())
        return min(1.0, sum(self.traced_elements.values()) / total) if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "coverage": self.coverage}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TraceReport":
        """Undo `to_dict`."""
        values = {key: value for key, value in data.items() if key != "coverage"}
        opaque = [
            OpaqueModule(**{**entry, "classes": tuple(entry.get("classes", ()))})
            for entry in values.pop("opaque")
        ]
        bare = {name: BareParameter(**entry) for name, entry in values.pop("bare", {}).items()}
        return cls(**values, opaque=opaque, bare=bare)

    def headline(self) -> str:
        """The way, whether it was verified, and how much of the weight the graph can see."""
        checked = (
            f"compared with the model on {self.verified} calls"
            if self.verified
            else "not verified against the model: pass example inputs"
        )
        return (
            f"traced by: {self.way}, {checked}; product weights that the graph can see: "
            f"{self.coverage:.1%}"
        )

    def columns(self) -> Sequence[str]:
        """The columns of the table of opaque modules."""
        return ("opaque module", "type", "reason")

    def cells(self) -> list[Sequence[Any]]:
        """One row for each opaque module."""
        return [(o.module, o.type, o.reason) for o in self.opaque]

    def records(self) -> list[dict[str, Any]]:
        """The opaque modules as mappings of equal keys."""
        return [{**asdict(o), "classes": " ".join(o.classes)} for o in self.opaque]

    def __str__(self) -> str:
        lines = [self.headline().replace("; ", "\n", 1)]
        lines += [f"not taken: {line}" for line in self.attempts]
        lines += [f"refuses: {line}" for line in self.refused]
        lines += [f"output: {line}" for line in self.left_out]
        if self.unreached:
            lines.append("never called: " + ", ".join(self.unreached))
        if self.opaque:
            lines.append(self.table())
            classes = sorted({name for o in self.opaque for name in o.classes})
            lines.append(
                "Opaque modules keep their Python code: their inner ops are not analysed, and "
                "saving needs allow_modules with " + (", ".join(classes) or "no further class")
            )
        return "\n".join(lines)


def trace_report(gm: GraphModule) -> TraceReport:
    """The report of the trace that `gm` came from.

    Raises:
        OptionError: `gm` does not come from `trace`.
    """
    check_graph("trace_report", gm)
    report = gm.meta.get(REPORT_KEY)
    if not isinstance(report, TraceReport):
        raise OptionError(
            "trace_report",
            found="a GraphModule without a trace report",
            needed="one that fxquant.trace returned",
            remedy="Call fxquant.trace(model, example_inputs) first.",
        )
    return report
