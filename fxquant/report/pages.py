"""The pages of records and reports, from plain data."""

import math
from collections.abc import Sequence
from typing import Any

from fxquant.report.html import Page
from fxquant.report.tables import filled_columns, format_shape

DECISION_HEADS = (
    "module", "type", "shape", "parameters", "action",
    "weight dB", "introduced dB", "cumulative dB", "output dB", "rule", "reason",
)  # fmt: skip


def decisions_page(
    title: str,
    decisions: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    graph: Any = None,
    pareto: Sequence[tuple[float, float]] = (),
) -> Page:
    """A page of the decisions, with what each layer cost."""
    costs = {row["module"]: row for row in rows}
    extra = {d["module"]: _facts(d, costs.get(d["module"], {})) for d in decisions}
    table = [_decision_row(d, costs.get(d["module"], {})) for d in decisions]
    heads, table = filled_columns(DECISION_HEADS, table)
    return Page(
        title=title,
        summary=_summary(decisions),
        table_title="Decisions",
        heads=heads,
        rows=table,
        bars=damage_bars(rows),
        pareto=pareto,
        graph=graph,
        extra=extra,
    )


def _summary(decisions: Sequence[dict[str, Any]]) -> str:
    if not decisions:
        return "A graph that was not quantized."
    count = sum(d["action"] != "float" for d in decisions)
    return f"{count} of {len(decisions)} layers with parameters are quantized."


def damage_bars(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Each layer with its SQNR, worst first: of the output where it was measured alone."""
    bars = []
    for row in rows:
        figures = (row.get("output_sqnr_db"), row.get("introduced_sqnr_db"), row["weight_sqnr_db"])
        value = next(float(f) for f in figures if f is not None)
        if math.isfinite(value):
            bars.append((row["module"], value))
    return sorted(bars, key=lambda bar: bar[1])


def _decision_row(decision: dict[str, Any], cost: dict[str, Any]) -> list[Any]:
    figures = ("weight_sqnr_db", "introduced_sqnr_db", "cumulative_sqnr_db", "output_sqnr_db")
    return [
        decision["module"], decision["kind"], format_shape(decision["shape"]),
        decision["parameters"], decision["action"], *[cost.get(f) for f in figures],
        decision["rule"], decision["reason"],
    ]  # fmt: skip


def _facts(decision: dict[str, Any], cost: dict[str, Any]) -> dict[str, Any]:
    names = ("input_low", "input_high", "input_outlier_ratio", "cumulative_sqnr_db")
    return {
        "weight": format_shape(decision["shape"]),
        "action": decision["action"],
        "rule": decision["rule"],
        "reason": decision["reason"],
        **{name: cost.get(name) for name in names},
    }
