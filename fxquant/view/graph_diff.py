"""What changed between two graphs of a model, node by node."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.config.skip_rules import type_name
from fxquant.graph.graph_module import check_graph
from fxquant.graph.layers import sites, user_name
from fxquant.measure.quantization_info import INFO_KEY, QuantizationInfo
from fxquant.measure.sensitivity_row import as_number
from fxquant.measure.sizes import model_bytes
from fxquant.modules.layer import QuantizedLayer
from fxquant.numerics.metrics import sqnr_db
from fxquant.passes.fold_norms import fold_norms
from fxquant.report.html import Page, write_html
from fxquant.report.tables import format_db
from fxquant.report.view import View
from fxquant.view.graph_view import measured_rows

STATUSES = ("unchanged", "rewritten", "added", "removed")


@dataclass(frozen=True)
class NodeChange:
    """One node in one or both graphs.

    Attributes:
        node: its name; of a layer inside an opaque module, its path.
        module: the qualified name of the module it calls, or None.
        status: `"unchanged"`, `"rewritten"`, `"added"` or `"removed"`.
        before: the kind of op before, or None.
        after: the kind of op after, or None.
        rule: the rule of the decision, where the second graph carries a record.
        bytes_before: of the module's tensors.
        bytes_after: the same after.
        weight_sqnr_db: of the weights after against before; None where they are equal or absent.
        introduced_sqnr_db: from the record of the second graph.
    """

    node: str
    module: str | None
    status: str
    before: str | None
    after: str | None
    rule: str | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    weight_sqnr_db: float | None = None
    introduced_sqnr_db: float | None = None


@dataclass(frozen=True, repr=False)
class GraphDiff(View):
    """All nodes of two graphs with what happened to them."""

    changes: Sequence[NodeChange]

    @property
    def counts(self) -> dict[str, int]:
        """How many nodes have each status."""
        return {s: sum(c.status == s for c in self.changes) for s in STATUSES}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"counts": self.counts, "changes": [asdict(c) for c in self.changes]}

    def to_html(self, path: str | Path) -> None:
        """Write the changes as a self-contained page with search and sort."""
        heads = ("status", "node", "module", "before", "after", "bytes before", "bytes after",
                 "weight dB", "introduced dB", "rule")  # fmt: skip
        rows = [
            (c.status, c.node, c.module, c.before, c.after, c.bytes_before, c.bytes_after,
             c.weight_sqnr_db, c.introduced_sqnr_db, c.rule)
            for c in self.changes
        ]  # fmt: skip
        write_html(path, Page("What changed", self.headline(), "Nodes", heads, rows))

    def headline(self) -> str:
        """How many nodes have each status."""
        return ", ".join(f"{count} {status}" for status, count in self.counts.items())

    def columns(self) -> Sequence[str]:
        """The columns of the table."""
        return ("status", "node", "before", "after", "bytes", "bytes after", "weight dB", "rule")

    def cells(self) -> list[Sequence[Any]]:
        """One row for each node that changed."""
        return [
            (
                c.status,
                c.module or c.node,
                c.before,
                c.after,
                c.bytes_before or None,
                c.bytes_after or None,
                format_db(c.weight_sqnr_db),
                c.rule,
            )
            for c in self.changes
            if c.status != "unchanged"
        ]

    def records(self) -> list[dict[str, Any]]:
        """All nodes as mappings of equal keys."""
        return [asdict(change) for change in self.changes]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "GraphDiff":
        """Undo `to_dict`, also after JSON."""
        return cls([NodeChange(**{k: as_number(v) for k, v in c.items()}) for c in data["changes"]])


def diff(before: GraphModule, after: GraphModule) -> GraphDiff:
    """Compare two graphs of a model: float against quantized, or two runs.

    Nodes are matched by name, which every pass keeps. A node counts as rewritten when it calls
    another kind of module or function, or a module with other weights or format. Where the second
    graph has norms folded into its layers, they are removed, and its layers are compared with
    what they are in the first graph once its norms are folded.
    """
    check_graph("before", before)
    check_graph("after", after)
    old, new = _nodes(before), _nodes(after)
    record = after.meta.get(INFO_KEY) or {}
    rules = {d["module"]: d["rule"] for d in record.get("decisions", [])}
    rows = measured_rows(after)
    expected = old | _nodes(_with_norms_folded(before, record))
    changes = [
        _change(name, old.get(name), new.get(name), expected.get(name), rules, rows) for name in new
    ]
    changes += [_change(n, old[n], None, None, rules, rows) for n in old if n not in new]
    return GraphDiff(changes)


def _with_norms_folded(gm: GraphModule, record: dict[str, Any]) -> GraphModule:
    """The graph as it was compared with the quantized one that has this record."""
    if not record.get("folded_norms"):
        return gm
    return fold_norms(gm, QuantizationInfo.from_dict(record).decisions).gm


@dataclass(frozen=True)
class _GraphPlace:
    """A node, or a layer inside the opaque module that a node calls."""

    gm: GraphModule
    node: Node
    target: str | None = None

    @property
    def module(self) -> nn.Module | None:
        return None if self.target is None else self.gm.get_submodule(self.target)

    @property
    def kind(self) -> str:
        module = self.module
        if isinstance(module, QuantizedLayer):
            return f"{type(module).__name__}({module.extra_repr()})"
        return type(module).__name__ if module is not None else type_name(self.node.target)


def _nodes(gm: GraphModule) -> dict[str, _GraphPlace]:
    found = {}
    for node in gm.graph.nodes:
        target = str(node.target) if node.op == "call_module" else None
        found[node.name] = _GraphPlace(gm, node, target)
    for site in sites(gm):
        if site.is_inside:
            found[site.target] = _GraphPlace(gm, site.node, site.target)
    return found


def _change(
    name: str,
    old: _GraphPlace | None,
    new: _GraphPlace | None,
    expected: _GraphPlace | None,
    rules: dict[str, str],
    rows: dict[str, Any],
) -> NodeChange:
    place = new or old
    assert place is not None  # every name is in one of the graphs
    module = None if place.target is None else user_name(place.gm, place.target)
    before = None if old is None else old.module
    after = None if new is None else new.module
    status = "added" if old is None else "removed" if new is None else "unchanged"
    if expected is not None and new is not None and not _is_same(expected, new):
        status = "rewritten"
    is_rewritten = status == "rewritten"
    is_decided = is_rewritten or status == "removed"  # such as a norm that was folded
    return NodeChange(
        node=name,
        module=module,
        status=status,
        before=old.kind if old is not None else None,
        after=new.kind if new is not None else None,
        rule=rules.get(module or "") if is_decided else None,
        bytes_before=model_bytes(before) if before is not None else 0,
        bytes_after=model_bytes(after) if after is not None else 0,
        weight_sqnr_db=_weight_sqnr(expected, new) if is_rewritten else None,
        introduced_sqnr_db=rows.get(module or "", {}).get("introduced_sqnr_db"),
    )


def _is_same(old: _GraphPlace, new: _GraphPlace) -> bool:
    before, after = old.module, new.module
    if old.kind != new.kind:
        return False
    if before is not None and after is not None and before is not after:
        return _has_same_tensors(before, after)
    return str(old.node.args) == str(new.node.args) and str(old.node.kwargs) == str(new.node.kwargs)


def _has_same_tensors(before: nn.Module, after: nn.Module) -> bool:
    one, two = before.state_dict(), after.state_dict()
    return one.keys() == two.keys() and all(
        one[k].shape == two[k].shape and torch.equal(one[k], two[k]) for k in one
    )


def _weight_sqnr(old: _GraphPlace | None, new: _GraphPlace | None) -> float | None:
    before, after = (None if place is None else place.module for place in (old, new))
    one, two = getattr(before, "weight", None), getattr(after, "weight", None)
    if one is None or two is None or one.shape != two.shape:
        return None
    return sqnr_db(one, two)
