import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import QuantConfig
from fxquant.config.quant_config import as_config
from fxquant.errors import OptionError
from fxquant.tracing import trace as tracing


class OwnLinear(nn.Linear):
    pass


CONFIGS = [
    QuantConfig(),
    QuantConfig(bits={"a": 4, "b.*": 8, "re:c$": 16}, group_size=64, symmetric=False),
    QuantConfig(layer_types=[nn.Linear], skip_layer_types=[nn.Embedding, F.embedding, "LayerNorm"]),
    QuantConfig(skip_layer_names=[], modules_to_not_convert=("x",), skip_param_threshold=0),
    QuantConfig.preset("w8a8", sqnr_error_threshold=float("-inf")),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_is_a_value(config):
    for other in (
        QuantConfig.from_dict(config.to_dict()), copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)), config.changed(),
    ):  # fmt: skip
        assert other == config
        assert hash(other) == hash(config)
    assert config != config.changed(group_size=7)
    with pytest.raises(AttributeError):
        config.group_size = 3


def test_a_mapping_of_bits_cannot_be_changed_from_outside():
    bits = {"a": 4}
    config = QuantConfig(bits=bits)
    bits["a"] = 8
    assert config.bits["a"] == 4
    with pytest.raises(TypeError):
        config.bits["a"] = 8


@pytest.mark.parametrize(
    ("options", "found", "remedy"),
    [
        ({"bits": 7}, "7", "Choose one of these widths"),
        ({"bits": {"a": 7}}, r"bits\['a'\]", "16 leaves a module float"),
        ({"bits": True}, "True", "Choose one of these widths"),
        ({"group_size": 0}, "0", "32 are usual"),
        ({"symmetric": "no"}, "'no'", "True or False"),
        ({"method": "gptk"}, "'gptk'", "Did you mean 'gptq'"),
        ({"observer": "histogramm"}, "histogramm", "Did you mean 'histogram'"),
        ({"activation_bits": 4}, "4", "Leave it None"),
        ({"layer_types": [nn.LSTM]}, "LSTM", "Leave layer_types out"),
        ({"layer_types": nn.Linear}, "Linear", r"layer_types=\["),
        ({"modules_to_not_convert": "head"}, "the text 'head'", r"\['head'\]"),
        ({"skip_layer_names": ["re:("]}, "does not compile", "Correct it"),
        ({"skip_param_threshold": -1}, "-1", "Pass 0"),
        ({"num_calibration_samples": 2.5}, "2.5", "positive int"),
        ({"accuracy_warning": "warm"}, "'warm'", "Did you mean 'warn'"),
        ({"sqnr_error_threshold": float("nan")}, "nan", "an int or a float"),
        ({"sqnr_warning_threshold": "20"}, "'20'", "an int or a float"),
    ],
)
def test_a_wrong_value_is_refused_when_the_config_is_made(options, found, remedy):
    with pytest.raises(OptionError, match=found) as error:
        QuantConfig(**options)
    with pytest.raises(OptionError, match=remedy):
        raise error.value


@pytest.mark.parametrize(
    "call",
    [
        lambda: QuantConfig.from_dict({"group_sise": 64}),
        lambda: QuantConfig.preset("w4a16", group_sise=64),
        lambda: QuantConfig().changed(group_sise=64),
        lambda: fxquant.quantize(nn.Linear(64, 64), group_sise=64),
        lambda: fxquant.plan(nn.Linear(64, 64), group_sise=64),
    ],
)
def test_a_misspelt_option_is_an_error_with_the_near_miss(call):
    with pytest.raises(OptionError, match="Did you mean 'group_size'"):
        call()


def test_what_stands_for_a_config():
    small = QuantConfig(bits=8, group_size=64)
    assert as_config(None, {}) == QuantConfig()
    assert as_config(small, {"bits": 4}) == QuantConfig(group_size=64)
    assert as_config({"bits": 8, "group_size": 64}, {}) == small
    assert as_config("w4a8", {"group_size": 32}).activation_bits == 8
    with pytest.raises(OptionError, match="Did you mean 'w4a8'"):
        as_config("w4a88", {})
    with pytest.raises(OptionError, match="a QuantConfig, the name of a preset"):
        as_config(4, {})


def test_a_recipe_file_makes_the_same_config(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('preset = "w4a8"\ngroup_size = 64\nmodules_to_not_convert = ["head"]\n')
    expected = QuantConfig.preset("w4a8", group_size=64, modules_to_not_convert=["head"])
    assert (
        QuantConfig.from_toml(path) == as_config(str(path), {}) == as_config(path, {}) == expected
    )
    path.write_text("bits = = 4")
    with pytest.raises(OptionError, match="recipe .* cannot be read"):
        QuantConfig.from_toml(path)
    path.write_text("bitts = 4")
    with pytest.raises(OptionError, match="Did you mean 'bits'"):
        QuantConfig.from_toml(path)


def test_a_class_in_a_rule_selects_its_subclasses_also_after_saving():
    model = nn.Sequential(OwnLinear(64, 64), nn.Linear(64, 64))
    config = QuantConfig(skip_layer_types=[nn.Linear], group_size=32)
    loaded = QuantConfig.from_dict(config.to_dict())
    for made in (config, loaded):
        decisions = fxquant.plan(model, None, made).decisions
        assert [d.action for d in decisions] == ["float", "float"]
        assert decisions[0].rule == "skip_layer_types: Linear"


def test_a_loaded_graph_tells_the_config_it_was_made_with(tmp_path):
    config = QuantConfig(bits={"0": 8}, group_size=32, accuracy_warning="ignore")
    graph, info = fxquant.quantize(nn.Sequential(nn.Linear(64, 64)), None, config)
    fxquant.save_model(graph, tmp_path / "m.safetensors", info)
    assert fxquant.info(fxquant.load_model(tmp_path / "m.safetensors")).config == info.config
    assert info.config == config.changed(observer="dynamic")


def test_into_model_gives_the_users_class_and_one_call_allocates():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 64)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    model, data = Net(), [torch.randn(32, 64) for _ in range(3)]
    options = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}
    graph, _ = fxquant.quantize(model, data, **options)
    copied, info = fxquant.quantize(model, data, into="model", **options)
    assert type(copied) is Net
    assert torch.equal(copied(data[0]), graph(data[0]))
    assert info.config.group_size == 32

    graph, info = fxquant.quantize(model, iter(data), average_bits=6, **options)
    bits = dict(info.config.bits)
    elements = {"a": 64 * 96, "b": 96 * 64}
    assert 5 < sum(bits[n] * elements[n] for n in bits) / sum(elements.values()) <= 6
    with pytest.raises(OptionError, match="data to measure on"):
        fxquant.quantize(model, average_bits=6)
    with pytest.raises(OptionError, match="Pass the model"):
        fxquant.quantize(fxquant.trace(model), data, into="model")


@pytest.mark.parametrize("seed", range(3))
def test_a_mix_of_widths_is_never_worse_than_one_width_on_rows_held_out(seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 64) for _ in range(6)]
    for number, layer in enumerate(layers):  # each matters more than the one before it
        nn.init.normal_(layer.weight, std=0.05 * (1 + number))
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
    data = [torch.randn(64, 64) for _ in range(3)]
    options = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}
    _, mixed = fxquant.quantize(model, data, average_bits=4, **options)
    _, uniform = fxquant.quantize(model, data, bits=4, **options)
    assert mixed.sqnr_db >= uniform.sqnr_db


def test_sensitivity_allocate_and_quantize_share_one_trace(monkeypatch):
    data = [torch.randn(32, 64) for _ in range(3)]
    graph = fxquant.trace(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), data[0])
    monkeypatch.setattr(tracing, "trace", None)
    report = fxquant.sensitivity(graph, data, method="gradient", group_size=32)
    bits = fxquant.allocate(report, average_bits=6)
    _, info = fxquant.quantize(graph, data, bits=bits, group_size=32, accuracy_warning="ignore")
    assert info.selected_layers == ["0", "2"]
