import pytest
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.config.quant_config import QuantConfig
from fxquant.config.skip_rules import DEFAULT_INT4_SKIP
from fxquant.errors import OptionError, RuleError
from fxquant.passes.decide import decide
from tests import models


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 64)
        self.encoder = nn.ModuleList(models.Plain() for _ in range(2))
        self.narrow = nn.Linear(64, 8)
        self.lm_head = nn.Linear(8, 200)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.encoder:
            x = layer(x)
        return F.layer_norm(self.lm_head(self.narrow(x)), (200,))


def decisions(**options):
    options = {"group_size": 32, **options}
    decisions = decide(fxquant.trace(Network()), QuantConfig(**options))
    return {d.module: d for d in decisions}


def actions(**options):
    return {name: d.action for name, d in decisions(**options).items()}


def test_every_weighted_node_has_a_row_with_rule_and_reason():
    rows = decisions()
    assert list(rows) == [
        "embedding", "encoder.0.first", "encoder.0.norm", "encoder.0.second",
        "encoder.1.first", "encoder.1.norm", "encoder.1.second", "narrow", "lm_head",
    ]  # fmt: skip
    assert all(d.rule and d.reason for d in rows.values())
    assert rows["embedding"].rule == "default: skip_types: Embedding"
    assert rows["encoder.0.norm"].rule == "default: skip_types: LayerNorm"
    assert rows["lm_head"].rule == "default: skip_names: lm_head"
    assert rows["narrow"].rule == "default: skip_param_threshold"
    assert "520 parameters are fewer than 1024" in rows["narrow"].reason
    assert rows["encoder.0.first"].action == "int4"
    assert rows["encoder.0.first"].shape == (96, 64)


@pytest.mark.parametrize(
    ("rule", "skipped"),
    [
        ("encoder.0.first", ["encoder.0.first"]),
        ("encoder.1", ["encoder.1.first", "encoder.1.second"]),
        ("encoder.*.second", ["encoder.0.second", "encoder.1.second"]),
        (r"re:encoder\.\d+\.f", ["encoder.0.first", "encoder.1.first"]),
    ],
)
@pytest.mark.parametrize("argument", ["modules_to_not_convert", "skip_layer_names"])
def test_a_name_rule_keeps_exactly_what_it_says(argument, rule, skipped):
    before, after = actions(), decisions(**{argument: [rule]})
    for name, decision in after.items():
        if name in skipped:
            assert (decision.action, decision.rule) == ("float", f"{argument}: {rule}")
        elif name != "lm_head":
            assert decision.action == before[name]
    expected = "float" if argument == "modules_to_not_convert" else "int8"
    assert after["lm_head"].action == expected  # a given list replaces the default's entry


def test_in_features_below_the_group_size_fall_back_to_int8():
    rows = decisions(group_size=80)
    assert (rows["encoder.0.first"].action, rows["encoder.0.first"].rule) == ("int8", "group_size")
    assert rows["encoder.0.second"].action == "int4"
    assert "64 inputs are fewer than a group of 80" in rows["encoder.0.first"].reason


def test_types_can_be_skipped_or_chosen():
    assert "int4" not in actions(skip_layer_types=[nn.Linear]).values()
    assert decisions(skip_layer_types=["Linear"])["narrow"].rule == "skip_layer_types: Linear"
    assert decisions(skip_layer_types=[])["embedding"].rule == "embeddings"
    assert actions(layer_types=[nn.Linear])["encoder.0.first"] == "int4"
    with pytest.raises(OptionError, match=r"LSTM.*can be quantized: Linear"):
        decisions(layer_types=[nn.LSTM])


def test_a_mapping_of_bits_decides_alone():
    rows = decisions(bits={"encoder.0": 8, "narrow": 4, "encoder.1.first": 16})
    assert rows["encoder.0.first"].action == rows["encoder.0.second"].action == "int8"
    assert rows["narrow"].action == "int4"
    assert (rows["encoder.1.first"].action, rows["encoder.1.first"].rule) == ("float", "bits")
    assert rows["encoder.1.second"].reason == "the mapping does not name it"


@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({"modules_to_not_convert": ["encoder.0.frist"]}, r"encoder\.0\.first"),
        ({"skip_layer_names": ["lm_haed"]}, "lm_head"),
        ({"skip_layer_names": ["*.atn.*"]}, "Some names|Near misses"),
        ({"skip_layer_types": [nn.Conv2d]}, "LayerNorm"),
        ({"bits": {"encoder.9": 4}}, r"encoder\.0"),
    ],
)
def test_a_rule_that_matches_nothing_lists_near_misses(options, near):
    with pytest.raises(RuleError, match=near):
        decisions(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"group_size": 0}, "group_size.*at least 1"),
        ({"group_size": -4}, "group_size.*at least 1"),
        ({"bits": 7}, "bits.*one of 2, 3, 4, 5, 6, 8"),
        ({"bits": {"narrow": 7}}, r"bits\['narrow'\].*5, 6, 8, 16"),
        ({"skip_param_threshold": -1}, "Pass 0"),
        ({"skip_layer_names": "lm_head"}, r"skip_layer_names=\['lm_head'\]"),
        ({"skip_layer_names": ["re:("]}, "does not compile"),
        ({"skip_layer_names": [""]}, "Write the rule as text"),
    ],
)
def test_impossible_options_say_what_is_possible(options, text):
    with pytest.raises(OptionError, match=text):
        decisions(**options)


def test_the_default_rules_can_be_read_both_ways():
    assert DEFAULT_INT4_SKIP.skip_names == DEFAULT_INT4_SKIP["skip_names"] == ("lm_head",)
    assert nn.Embedding in DEFAULT_INT4_SKIP.skip_types
    assert DEFAULT_INT4_SKIP.skip_param_threshold == 1024


def test_a_dry_run_touches_no_weight():
    info = fxquant.plan(Network(), group_size=32)
    assert "encoder.0.first" in info.table()
    assert info.selected_layers == [
        f"encoder.{i}.{n}" for i in range(2) for n in ("first", "second")
    ]
    assert info.rows == []
