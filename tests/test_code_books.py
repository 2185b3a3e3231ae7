"""Weights with the levels of a code book, through everything that knows a quantized weight."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaForCausalLM

import fxquant
from fxquant.errors import OptionError
from fxquant.integrations.transformers import FxquantConfig
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.modules.linear_of import linear_of
from fxquant.numerics.weights import quantize_weight
from tests.exporters.conftest import SMALL
from tests.exporters.layers import quantized_layers

NF4 = {"code_book": "nf4", "group_size": 32, "accuracy_warning": "ignore"}
X = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))


class Several(nn.Module):
    """Layers of several kinds, and one with fewer inputs than a group has."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 64)
        self.up, self.narrow = nn.Linear(64, 96), nn.Linear(16, 80)
        self.conv, self.down = nn.Conv1d(8, 12, 5, padding=2), nn.Linear(96, 64)

    def forward(self, x):
        y = self.up(x + self.words.weight[:1]).relu()
        y = y + self.conv(y.view(-1, 8, 12)).flatten(1)[:, :96]
        return self.down(y) + self.narrow(x[:, :16])[:, :64]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Several().eval()


@pytest.fixture(scope="module")
def q(model):
    return fxquant.quantize(model, [X], skip_param_threshold=0, **NF4)[0]


def books(q):
    return {name: layer.code_book for name, layer in quantized_layers(q).items()}


def test_layers_of_4_bits_have_the_book_and_take_the_bytes_of_integers(model, q):
    plain, info = fxquant.quantize(model, [X], skip_param_threshold=0, **{**NF4, "code_book": None})
    own = q.meta["fxquant_info"]
    assert books(q) == {"up": "nf4", "narrow": None, "conv.matrix": "nf4", "down": "nf4"}
    assert own["quantized_size_mb"] == info.quantized_size_mb
    reasons = {d["module"]: d["reason"] for d in own["decisions"]}
    assert "4 bits by default, with the levels of nf4" in reasons["up"]
    assert "nf4" not in reasons["narrow"]
    planned = fxquant.plan(model, [X], skip_param_threshold=0, **NF4)
    assert all(reasons[d.module].startswith(d.reason) for d in planned.decisions)
    for name, layer in quantized_layers(q).items():
        assert layer.saved_bytes == quantized_layers(plain)[name].saved_bytes
    assert "nf4" in repr(q.up)
    assert "group_size=32, nf4" in str(fxquant.diff(plain, q))


@pytest.mark.parametrize("method", ["rtn", "hqq", "awq", "gptq", "best"])
def test_every_method_makes_them(model, method):
    made, info = fxquant.quantize(model, [X], method=method, skip_param_threshold=0, **NF4)
    assert books(made)["up"] == "nf4"
    assert info.sqnr_db > 12
    assert fxquant.sqnr_db(model(X), made(X)) > 12


def test_widths_mix_embeddings_have_it_and_bits_are_allocated(model):
    mapping = {"up": 4, "down": 3, "conv": 4}
    mixed, _ = fxquant.quantize(model, [X], bits=mapping, embeddings=4, **NF4)
    assert books(mixed) == {"up": "nf4", "conv.matrix": "nf4", "down": None}
    assert mixed(X).isfinite().all()
    report = fxquant.sensitivity(model, [X], code_book="nf4", group_size=32, rounding="rtn")
    assert {row.module for row in report.rows} >= {"up", "down"}
    given, _ = fxquant.quantize(model, [X], average_bits=4.5, **NF4)
    assert set(books(given).values()) <= {None, "nf4"}


LOADS = """
import sys, torch, fxquant
x, y = torch.load(sys.argv[2])
q = fxquant.load_model(sys.argv[1])
assert torch.equal(q(x), y) and q.up.code_book == "nf4"
"""


def test_a_file_loads_in_another_process_and_names_the_book(model, q, tmp_path):
    path, data = tmp_path / "m.safetensors", tmp_path / "x.pt"
    fxquant.save_model(q, path)
    torch.save((X, q(X)), data)
    subprocess.run([sys.executable, "-c", LOADS, path, data], check=True)
    with safe_open(path, "pt") as file:
        assert '"code_book"' in " ".join(file.metadata().values())
    for swapped in (fxquant.swap_modules(model, q), fxquant.load_into(Several(), path)):
        assert torch.equal(swapped(X), q(X))
    state, made = q.up.state_dict(), fxquant.load_model(path).up
    made.load_state_dict({**state, "_scales": state["_scales"] * 2})
    torch.testing.assert_close(made.dequantize(), q.up.dequantize() * 2)
    other = QuantizedLinearInt4.from_float(nn.Linear(64, 96), 32)
    with pytest.raises(RuntimeError, match="_zero_points is not 8 everywhere"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    "damage",
    [{"code_book": "nf5"}, {"code_book": 4}, {"code_book": ["nf4"]}, {"symmetric": False}],
)
def test_a_damaged_description_is_refused(damage):
    layer = QuantizedLinearInt4.from_float(nn.Linear(64, 16), 32, code_book="nf4")
    tensors = layer.saved_tensors()
    again = QuantizedLinearInt4.rebuild(layer.describe(), tensors)
    assert torch.equal(again.dequantize(), layer.dequantize())
    with pytest.raises(OptionError, match="sizes and options"):
        QuantizedLinearInt4.rebuild({**layer.describe(), **damage}, tensors)
    for name, dtype in (("packed_weight", torch.int8), ("scales", torch.float32)):
        damaged = {**tensors, name: tensors[name].to(dtype)}
        with pytest.raises(OptionError, match="damaged"):
            QuantizedLinearInt4.rebuild(layer.describe(), damaged)


def test_transformers_saves_and_loads_it_and_rounds_to_it_while_loading(tmp_path):
    tokens = torch.arange(6)[None]
    model = LlamaForCausalLM(SMALL).eval()
    made, _ = fxquant.quantize(model, [{"input_ids": tokens}], **NF4)
    swapped = fxquant.swap_modules(model, made)
    swapped.save_pretrained(tmp_path / "swapped")
    model.save_pretrained(tmp_path / "float")
    config = FxquantConfig(code_book="nf4", group_size=32)
    loaded = [
        LlamaForCausalLM.from_pretrained(tmp_path / "swapped").eval(),
        LlamaForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).eval(),
    ]
    assert {m.model.layers[0].mlp.up_proj.code_book for m in loaded} == {"nf4"}
    assert torch.equal(loaded[0](tokens).logits, swapped(tokens).logits)
    assert fxquant.sqnr_db(model(tokens).logits, loaded[1](tokens).logits) > 10


@pytest.mark.parametrize("format", ["onnx", "gptq", "awq", "compressed-tensors", "gguf"])
def test_formats_of_integers_refuse_it_and_say_what_to_do(model, q, format):
    found = [f for f in fxquant.check_export(q, format) if f.where == "up"]
    assert [f.is_loss for f in found] == [True]
    assert "nf4" in found[0].problem
    assert "Quantize without code_book" in str(found[0])
    with pytest.raises(OptionError, match="code_book: got 'nf4' for the target"):
        fxquant.QuantConfig(code_book="nf4", target=format)


@pytest.mark.parametrize("standard", [False, True])
def test_a_file_of_torch_export_holds_it(tmp_path, standard):
    q, _ = fxquant.quantize(nn.Sequential(nn.Linear(64, 64)), skip_param_threshold=0, **NF4)
    fxquant.export(q, tmp_path / "m.pt2", format="pt2", example_inputs=X, standard=standard)
    (found,) = torch.export.load(tmp_path / "m.pt2").module()(X)
    assert fxquant.sqnr_db(q(X), found) > (40 if standard else 120)


def test_layers_that_read_one_value_are_fused_to_one(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return nn.functional.silu(self.gate(x)) * self.up(x)

    made, _ = fxquant.quantize(Pair().eval(), [X], skip_param_threshold=0, **NF4)
    fused = fxquant.fuse(made)
    assert fxquant.sqnr_db(made(X), fused(X)) > 60
    fxquant.save_model(fused, tmp_path / "m.safetensors")
    assert torch.equal(fxquant.load_model(tmp_path / "m.safetensors")(X), fused(X))


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_convolutions_multiply_the_levels(kind, activation_bits):
    conv = nn.Sequential(kind(16, 40, 3, padding=1)).eval()
    x = torch.randn(2, 16, *[12] * (1 if kind is nn.Conv1d else 2))
    options = {**NF4, "group_size": -1, "activation_bits": activation_bits}
    made, _ = fxquant.quantize(conv, [x], skip_param_threshold=0, observer="dynamic", **options)
    expected = fxquant.dequantize_model(made)(x)
    assert fxquant.sqnr_db(expected, made(x)) > (40 if activation_bits is None else 30)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"code_book": "nf5"}, "code_book: got 'nf5'.*Did you mean 'nf4'"),
        ({"code_book": "nf4", "bits": 8}, "code_book: got 'nf4' for weights of 8 bits.*bits=4"),
        ({"code_book": "nf4", "bits": {"a": 3}}, "code_book: got 'nf4' for weights of 3 bits"),
        ({"code_book": "nf4", "symmetric": False}, "symmetric: got False with the code book"),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_words(options, text):
    with pytest.raises(OptionError, match=text):
        fxquant.QuantConfig(**options)
    config = fxquant.QuantConfig(code_book="nf4")
    assert fxquant.QuantConfig.from_dict(config.to_dict()) == config
    assert "code_book" not in fxquant.QuantConfig().to_dict()


def test_a_layer_moves_and_is_copied_with_its_book():
    weight = quantize_weight(torch.randn(20, 48), 4, 16, code_book="nf4")
    layer = linear_of(weight, None)
    for other in (layer.with_bias(torch.ones(20)), layer.half(), layer.to_float().weight):
        values = other if isinstance(other, torch.Tensor) else other.dequantize()
        assert torch.equal(values, weight.dequantize())
    assert layer.quantized_weight.code_book == "nf4"
