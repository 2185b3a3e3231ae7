import itertools
import json
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import OptionError
from fxquant.report.drawing import grade_of
from fxquant.report.folding import fold_repeats
from fxquant.report.html import Page, render
from fxquant.report.layout import LAYER_HEIGHT, layered_layout
from tests import models

X = torch.randn(8, 5, models.WIDTH)
SVG = "{http://www.w3.org/2000/svg}"


class Deep(nn.Module):
    def __init__(self, layers=80):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def nodes_of(svg):
    return {g.get("data-node"): g for g in ElementTree.fromstring(svg).iter(f"{SVG}g")}


def test_a_graph_of_two_thousand_nodes_folds_to_a_readable_one(tmp_path):
    gm = fxquant.trace(Deep())
    graph = fxquant.to_networkx(gm)
    assert len(graph) >= 2000
    folded = fold_repeats(graph)
    assert len(folded) < 120
    assert sum(d.get("folded", 1) for _, d in folded.nodes(data=True)) == len(graph)
    assert folded.nodes["layers.5"]["folded"] == 25
    assert "layers_0_linear1" in folded
    assert nx.is_directed_acyclic_graph(folded)
    fxquant.draw(gm, tmp_path / "g.svg")
    assert set(nodes_of((tmp_path / "g.svg").read_text())) == set(folded)


def test_every_edge_points_downwards_and_boxes_do_not_overlap():
    graph = fold_repeats(fxquant.to_networkx(fxquant.trace(Deep(4))))
    widths = dict.fromkeys(graph, 80.0)
    places = layered_layout(graph, widths)
    assert all(places[a][1] < places[b][1] for a, b in graph.edges())
    rows = {}
    for x, y in places.values():
        assert y % LAYER_HEIGHT == 0
        rows.setdefault(y, []).append(x)
    for row in rows.values():
        row.sort()
        assert all(b - a >= 80 for a, b in itertools.pairwise(row))


def test_colours_tell_the_error(tmp_path):
    assert [grade_of(v) for v in (None, 35, 25, 15, 5, float("nan"))] == [
        "none", "good", "fair", "low", "critical", "critical",
    ]  # fmt: skip
    q, info = fxquant.static_quantize(models.Plain(), [X], group_size=32, accuracy_warning="ignore")
    fxquant.draw(q, tmp_path / "q.svg")
    boxes = nodes_of((tmp_path / "q.svg").read_text())
    grade = {"good": "#2e8b57", "fair": "#5b8dd9"}[grade_of(info.rows[0].introduced_sqnr_db)]
    assert boxes["first"].findall(f"{SVG}rect")[1].get("stroke") == grade


def test_a_dot_file_has_every_node_and_edge(tmp_path):
    gm = fxquant.trace(models.Plain())
    fxquant.draw(gm, tmp_path / "g.dot")
    text = (tmp_path / "g.dot").read_text()
    assert text.startswith("digraph {")
    assert all(f'"{n.name}" [' in text for n in gm.graph.nodes)
    assert '"x" -> "first"' in text
    with pytest.raises(OptionError, match=r"'\.dot', '\.svg' or '\.html'"):
        fxquant.draw(gm, tmp_path / "g.png")


def test_a_page_is_self_contained_and_names_cannot_break_out():
    evil = "</script><script>alert(1)</script>"
    page = render(Page("t", heads=["a"], rows=[[evil, float("nan")]], bars=[(evil, 3.0)]))
    assert evil not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["table"]["rows"][0][0] == evil


def test_a_quantized_model_folds_too_and_reports_write_pages(tmp_path):
    model = Deep(5)
    data = [torch.randn(2, 6, 32)]
    q, info = fxquant.static_quantize(
        model, data, group_size=32, activation_bits=8, accuracy_warning="ignore"
    )
    folded = fold_repeats(fxquant.to_networkx(q))
    assert "layers.3" in folded
    worst = min(r.introduced_sqnr_db for r in info.rows if r.module.startswith("layers.3."))
    assert folded.nodes["layers.3"]["sqnr_db"] == worst
    report = fxquant.sensitivity(model, data, group_size=32, method="exact")
    report.to_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "layers.0.linear1" in page
    assert report.pareto[0][0] == 2  # the narrowest width
    fxquant.diff(fxquant.trace(model), q).to_html(tmp_path / "d.html")
    assert "QuantizedLinearInt4" in (tmp_path / "d.html").read_text()
