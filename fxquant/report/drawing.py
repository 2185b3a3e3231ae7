"""Graphs as `.dot` and `.svg`; colours tell the error a node introduced."""

import json
from typing import Any
from xml.etree import ElementTree as Xml

import networkx as nx

from fxquant.report.layout import LAYER_HEIGHT, layered_layout

CHARACTER = 6.6  # width of one, in pixels
BOX_HEIGHT = 26.0
BORDER = 20.0
SIDE = 190.0  # how far an edge that passes boxes swings out
# From good to bad, each with the least SQNR in dB that earns it; readable on light and dark.
GRADES = ((30.0, "good"), (20.0, "fair"), (10.0, "low"), (float("-inf"), "critical"))
COLOURS = {
    "good": "#2e8b57", "fair": "#5b8dd9", "low": "#e0a030", "critical": "#d04545",
    "none": "#8a8f98",
}  # fmt: skip


def grade_of(sqnr_db: float | None) -> str:
    """Which colour an SQNR has."""
    if sqnr_db is None:
        return "none"
    return next((grade for least, grade in GRADES if sqnr_db >= least), "critical")


def label_of(name: str, data: dict[str, Any]) -> str:
    """What a node's box says."""
    label = data.get("module") or name
    if data.get("folded"):
        return f"{label}  ({data['folded']} nodes)"
    return f"{label}  {data['bits']} bit" if data.get("bits") else str(label)


def to_dot(graph: "nx.MultiDiGraph[str]") -> str:
    """The graph in the language of Graphviz."""
    lines = ["digraph {", "  rankdir=TB; node [shape=box, style=rounded];"]
    for name, data in graph.nodes(data=True):
        colour = COLOURS[grade_of(data.get("sqnr_db"))]
        label = json.dumps(label_of(name, data))
        lines.append(f'  {json.dumps(name)} [label={label}, color="{colour}"];')
    for source, target, data in graph.edges(data=True):
        label = json.dumps(str(data.get("argument", "")))
        lines.append(f"  {json.dumps(source)} -> {json.dumps(target)} [label={label}];")
    return "\n".join([*lines, "}"]) + "\n"


def to_svg(graph: "nx.MultiDiGraph[str]") -> str:
    """The graph as a picture; each node is a focusable group with its name in `data-node`."""
    labels = {name: label_of(name, data) for name, data in graph.nodes(data=True)}
    widths = {name: max(60.0, len(text) * CHARACTER + 16) for name, text in labels.items()}
    places = layered_layout(graph, widths)
    left = min((x - widths[n] / 2 for n, (x, _) in places.items()), default=0) - BORDER
    right = max((x + widths[n] / 2 for n, (x, _) in places.items()), default=0) + BORDER + SIDE
    bottom = max((y for _, y in places.values()), default=0) + BOX_HEIGHT + BORDER
    box = f"{left:.0f} {-BORDER:.0f} {right - left:.0f} {bottom + BORDER:.0f}"
    svg = Xml.Element(
        "svg", xmlns="http://www.w3.org/2000/svg", viewBox=box,
        width=f"{right - left:.0f}", height=f"{bottom + BORDER:.0f}",
    )  # fmt: skip
    svg.set("font-family", "ui-monospace, monospace")
    svg.set("font-size", "11")
    for source, target in dict.fromkeys((s, t) for s, t, _ in graph.edges(keys=True)):
        _edge(svg, places[source], places[target])
    for name, data in graph.nodes(data=True):
        _box(svg, name, labels[name], places[name], widths[name], grade_of(data.get("sqnr_db")))
    return Xml.tostring(svg, encoding="unicode")


def _edge(svg: Xml.Element, start: tuple[float, float], end: tuple[float, float]) -> None:
    x1, y1, x2, y2 = start[0], start[1] + BOX_HEIGHT, end[0], end[1]
    if end[1] - start[1] > 1.5 * LAYER_HEIGHT:  # past other boxes: leave and arrive at the side
        y1, y2 = start[1] + BOX_HEIGHT / 2, end[1] + BOX_HEIGHT / 2
        side = max(x1, x2) + SIDE + 0.04 * (y2 - y1)
        path = f"M{x1:.0f},{y1:.0f} C{side:.0f},{y1:.0f} {side:.0f},{y2:.0f} {x2:.0f},{y2:.0f}"
    else:
        middle = (y1 + y2) / 2
        path = f"M{x1:.0f},{y1:.0f} C{x1:.0f},{middle:.0f} {x2:.0f},{middle:.0f} {x2:.0f},{y2:.0f}"
    Xml.SubElement(svg, "path", d=path, fill="none", stroke="#8a8f98").set("stroke-width", "1")


def _tint(grade: str) -> dict[str, str]:
    return {"fill": COLOURS[grade], "fill-opacity": "0.22", "stroke": COLOURS[grade]}


def _box(
    svg: Xml.Element, name: str, label: str, place: tuple[float, float], width: float, grade: str
) -> None:
    x, y = place
    group = Xml.SubElement(svg, "g", tabindex="0", role="button")
    group.set("data-node", name)
    group.set("aria-label", label)
    for style in ({"class": "paper", "fill": "Canvas"}, _tint(grade)):  # paper hides edges behind
        box = Xml.SubElement(group, "rect", x=f"{x - width / 2:.0f}", y=f"{y:.0f}", rx="5")
        box.attrib.update({"width": f"{width:.0f}", "height": f"{BOX_HEIGHT:.0f}", **style})
    text = Xml.SubElement(group, "text", x=f"{x:.0f}", y=f"{y + 17:.0f}", fill="currentColor")
    text.set("text-anchor", "middle")
    text.text = label
