import torch

import fxquant
from tests import models
from tests.models import WIDTH

X = torch.randn(3, 5, WIDTH)
QUIET = {"group_size": 32, "accuracy_warning": "ignore"}


def test_the_networkx_graph_tells_shapes_bits_and_argument_positions():
    q, info = fxquant.static_quantize(models.Plain(), [X], **QUIET)
    graph = fxquant.to_networkx(q)
    assert set(graph) == {n.name for n in q.graph.nodes}
    first = graph.nodes["first"]
    assert (first["kind"], first["bits"], first["shape"]) == ("QuantizedLinearInt4", 4, [3, 5, 96])
    assert first["parameters"] == 96 * WIDTH + 96
    assert first["sqnr_db"] == info.rows[0].introduced_sqnr_db
    assert first["dtype"] == "float32"
    assert graph.get_edge_data("x", "first")[0]["argument"] == "0"


def test_layers_inside_an_opaque_module_are_in_the_networkx_graph():
    graph = fxquant.to_networkx(fxquant.trace(models.BranchInChild()))
    assert {"child", "head"} <= set(graph)
    assert graph.nodes["child.fc"]["module"] == "child.fc"
    assert list(graph.predecessors("child.fc")) == ["child"]


def test_a_diff_tells_what_was_rewritten_by_which_rule_and_at_what_cost():
    gm = fxquant.trace(models.Plain(), X)
    q, info = fxquant.static_quantize(gm, [X], activation_bits=8, **QUIET)
    changes = {c.node: c for c in fxquant.diff(gm, q).changes}
    assert changes["norm"].status == "unchanged"
    assert changes["first"].status == "rewritten"
    assert changes["first"].rule == "default"
    assert changes["first"].bytes_before == 4 * (96 * WIDTH + 96)
    assert changes["first"].weight_sqnr_db == info.rows[0].weight_sqnr_db
    assert changes["quantize_activation"].status == "added"
    back = fxquant.diff(q, gm)
    assert back.counts["removed"] == 8  # for either layer: scale, zero point, quantize, dequantize
    assert fxquant.diff(gm, gm).counts["rewritten"] == 0
    assert "QuantizedLinearInt4" in str(fxquant.diff(gm, q))


def test_two_runs_with_other_options_can_be_compared():
    one, _ = fxquant.static_quantize(models.Plain(), [X], **QUIET)
    again, _ = fxquant.static_quantize(one, [X], **QUIET)
    assert fxquant.diff(one, again).counts["rewritten"] == 0
