"""Which way a model was traced, what is opaque and why, and how much weight is in graphs."""

from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import OptionError
from fxquant.graph.scopes import sites

REPORT_KEY = "fxquant_trace_report"


@dataclass(frozen=True)
class OpaqueModule:
    """A module that is one node of its graph: its children are graphs of their own."""

    module: str
    type: str
    reason: str


@dataclass(frozen=True)
class TraceReport:
    """What tracing did.

    Attributes:
        way: `"symbolic"`, `"export"` or `"opaque"`, for the outermost graph.
        attempts: why better ways were not taken, one line each.
        opaque: each opaque module with the reason.
        unreached: linear layers of the model that no graph calls.
        left_out: outputs that a graph cannot hold.
        linear_elements: elements of all linear weights of the model, tied ones once.
        traced_elements: those of them that a graph multiplies with.
    """

    way: str
    attempts: list[str] = field(default_factory=list)
    opaque: list[OpaqueModule] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    linear_elements: int = 0
    traced_elements: int = 0

    @property
    def coverage(self) -> float:
        """The share of linear weight elements that sit in a traced graph, 0..1."""
        return self.traced_elements / self.linear_elements if self.linear_elements else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "coverage": self.coverage}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TraceReport":
        """Undo `to_dict`."""
        values = {key: value for key, value in data.items() if key != "coverage"}
        opaque = [OpaqueModule(**entry) for entry in values.pop("opaque")]
        return cls(**values, opaque=opaque)

    def __str__(self) -> str:
        lines = [f"traced by: {self.way}", f"linear weight in graphs: {self.coverage:.1%}"]
        lines += [f"not taken: {line}" for line in self.attempts]
        lines += [f"output: {line}" for line in self.left_out]
        if self.unreached:
            lines.append("never called: " + ", ".join(self.unreached))
        if self.opaque:
            rows = [(o.module, o.type, o.reason) for o in self.opaque]
            lines.append(tabulate(rows, headers=("opaque module", "type", "reason")))
        return "\n".join(lines)


def trace_report(gm: GraphModule) -> TraceReport:
    """The report of the trace that `gm` came from.

    Raises:
        OptionError: `gm` does not come from `trace`.
    """
    report = gm.meta.get(REPORT_KEY)
    if not isinstance(report, TraceReport):
        raise OptionError(
            "trace_report",
            found="a GraphModule without a trace report",
            needed="one that fxquant.trace returned",
            remedy="Call fxquant.trace(model, example_inputs) first.",
        )
    return report


def weigh(gm: GraphModule, prepared: nn.Module) -> tuple[int, int, list[str]]:
    """`(linear_elements, traced_elements, unreached)` of a traced model."""
    traced = {
        (site.module.weight.data_ptr(), site.module.weight.numel())
        for site in sites(gm)
        if isinstance(site.module, nn.Linear)
    }
    total, unreached = 0, []
    owned: set[tuple[int, int]] = set()
    counted: set[int] = set()
    for name, weight in _linear_weights(prepared):
        start, end = weight.data_ptr(), weight.data_ptr() + weight.numel() * weight.element_size()
        inside = {(pointer, count) for pointer, count in traced if start <= pointer < end}
        owned |= inside
        if not inside:
            unreached.append(name)
        if start not in counted:
            counted.add(start)
            total += weight.numel()
    traced_elements = sum(count for _, count in traced)
    return total + sum(count for _, count in traced - owned), traced_elements, unreached


def _linear_weights(prepared: nn.Module) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name, module in prepared.named_modules():
        if isinstance(module, nn.Linear):
            found.append((name, module.weight))
        for parameter in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            weight = module._parameters.get(parameter)
            if weight is not None:
                found.append((f"{name}.{parameter}".lstrip("."), weight))
    return found
