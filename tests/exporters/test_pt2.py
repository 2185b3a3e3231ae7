"""Files of torch.export, read back by torch."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import fxquant
from fxquant.exporters import pt2
from tests.exporters.conftest import IDS, SMALL
from tests.exporters.test_onnx import Network, quantized

pytestmark = pytest.mark.usefixtures("float32_products")


class Picture(nn.Module):
    """A convolution, an embedding of its label, and a Linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.label = nn.Embedding(10, 64)
        self.last = nn.Linear(64, 12)

    def forward(self, picture, label):
        return self.last(self.conv(picture).flatten(2).mean(1) + self.label(label))


def quantized_mixtral():
    """A mixture of experts that gives logits; its experts are quantized too."""
    config = MixtralConfig(
        vocab_size=SMALL.vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = MixtralForCausalLM(config)

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    graph, info = fxquant.quantize(
        Logits().eval(), example_inputs=IDS["input_ids"], group_size=32, skip_param_threshold=0,
        accuracy_warning="ignore",
    )  # fmt: skip
    assert any("experts" in d.module for d in info.decisions if d.action != "float")
    return graph


def loaded(path):
    return torch.export.load(path).module()


def values(output):
    return [output["last"], *output["hidden"]]


@pytest.mark.parametrize(
    ("options", "standard"),
    [
        ({}, False),
        ({"bits": 3, "symmetric": False}, False),
        ({"bits": 8, "group_size": -1}, False),
        ({"activation_bits": 8, "observer": "minmax"}, False),
        ({"bits": 3, "symmetric": False}, True),
        ({"activation_bits": 8, "observer": "dynamic"}, True),
    ],
    ids=str,
)
def test_the_program_computes_what_the_graph_does(options, standard, tmp_path):
    graph, path = quantized(**options), tmp_path / "model.pt2"
    assert fxquant.export(graph, path, format="pt2", standard=standard) == []
    x = torch.randn(3, 9, 64)  # another batch and length than the example's
    for one, other in zip(loaded(path)(x), values(graph(x)), strict=True):
        if standard:
            assert fxquant.sqnr_db(other, one) > 110
        else:
            assert torch.equal(one, other)


def test_packed_weights_are_what_the_file_holds(tmp_path):
    class Wide(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))

    graph, _ = fxquant.quantize(
        Wide().eval(), example_inputs=torch.randn(2, 512), accuracy_warning="ignore"
    )
    for standard in (False, True):
        fxquant.export(graph, tmp_path / "m.pt2", format="pt2", standard=standard)
        assert (tmp_path / "m.pt2").stat().st_size < 2 * 512 * 1024 * 4 / 6  # of float32


def test_layers_of_other_kinds_and_a_swapped_model(tmp_path):
    model, inputs = Picture().eval(), (torch.randn(2, 8, 8, 8), torch.tensor([1, 7]))
    graph, info = fxquant.quantize(
        model,
        example_inputs=inputs,
        embeddings=8,
        skip_param_threshold=0,
        group_size=32,
        accuracy_warning="ignore",
    )
    assert {d.module for d in info.decisions if d.action != "float"} == {"conv", "label", "last"}
    path = tmp_path / "model.pt2"
    fxquant.export(graph, path, format="pt2")
    more = (torch.randn(5, 8, 8, 8), torch.arange(5))
    assert torch.equal(loaded(path)(*more)[0], graph(*more))
    llama = LlamaForCausalLM(SMALL).eval()
    graph, _ = fxquant.quantize(llama, example_inputs=IDS, group_size=32, accuracy_warning="ignore")
    swapped = fxquant.swap_modules(llama, graph)
    example = {**IDS, "use_cache": False}
    fxquant.export(swapped, path, format="pt2", example_inputs=example)
    assert torch.equal(loaded(path)(IDS["input_ids"][:, :9])[0],
                       swapped(IDS["input_ids"][:, :9]).logits)  # fmt: skip
    with pytest.raises(fxquant.OptionError, match=r"(?s)example_inputs.*arguments of one call"):
        fxquant.export(swapped, path, format="pt2")


def test_a_process_without_fxquant_runs_a_standard_program(tmp_path):
    graph, path = quantized(), tmp_path / "model.pt2"
    x = torch.randn(3, 9, 64)
    fxquant.export(graph, path, format="pt2", standard=True, example_inputs=torch.randn(2, 5, 64))
    torch.save(x, tmp_path / "x")
    code = (
        "import sys, torch; run = torch.export.load('model.pt2').module(); "
        "torch.save(run(torch.load('x')), 'y'); assert 'fxquant' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "y")
    for one, other in zip(found, values(graph(x)), strict=True):
        assert fxquant.sqnr_db(other, one) > 110


def test_another_process_runs_a_program_once_it_has_the_operators(tmp_path):
    graph, path = quantized(), tmp_path / "model.pt2"
    x = torch.randn(3, 9, 64)
    fxquant.export(graph, path, format="pt2", example_inputs=torch.randn(2, 5, 64))
    torch.save(x, tmp_path / "x")
    code = (
        "import torch, fxquant.kernels.operators; run = torch.export.load('model.pt2').module(); "
        "torch.save(run(torch.load('x')), 'y')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for one, other in zip(torch.load(tmp_path / "y"), values(graph(x)), strict=True):
        assert fxquant.sqnr_db(other, one) > 45  # it may multiply in bfloat16, unlike this one


@pytest.mark.parametrize("standard", [False, True])
def test_experts_get_the_rows_that_are_routed_to_them(standard, tmp_path):
    """How many these are depends on values, which a program does not know."""
    graph, path = quantized_mixtral(), tmp_path / "model.pt2"
    fxquant.export(graph, path, format="pt2", standard=standard)
    run = loaded(path)
    for shape in ((2, 5), (1, 1), (3, 11)):  # one token leaves experts without a row
        ids = torch.arange(shape[0] * shape[1]).view(shape) % SMALL.vocab_size
        found, expected = run(ids)[0], graph(ids)
        if standard:
            assert fxquant.sqnr_db(expected, found) > 110
        else:
            assert torch.equal(found, expected)


def test_the_example_is_no_part_of_the_file(tmp_path):
    secret = torch.full((2, 5, 64), 0.123456789)
    path = tmp_path / "model.pt2"
    fxquant.export(quantized(), path, format="pt2", example_inputs=secret)
    assert secret[0, 0, :4].numpy().tobytes() not in path.read_bytes()
    (stored,), _ = torch.export.load(path).example_inputs  # AOTInductor asks for its shape
    assert torch.equal(stored, torch.zeros(2, 5, 64))


def test_what_torch_cannot_export_is_said_and_nothing_is_left(tmp_path):
    class Branching(Network):
        def forward(self, x):
            return self.last(x) if x.sum() > 0 else -self.last(x)

    model = Branching().eval()
    options = {"group_size": 32, "skip_param_threshold": 0}
    graph, _ = fxquant.quantize(model, example_inputs=torch.randn(2, 64), **options)
    swapped = fxquant.swap_modules(model, graph)
    with pytest.raises(fxquant.SaveError, match=r"torch\.export cannot take.*trace_report"):
        fxquant.export(swapped, tmp_path / "m.pt2", format="pt2", example_inputs=torch.ones(2, 64))
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_reads_back_differently_is_not_put_in_place(tmp_path, monkeypatch):
    load = torch.export.load

    def damaged(file):
        program = load(file)
        name = next(name for name in program.constants if "_kernel" in name)
        program.constants[name] = program.constants[name] ^ 1
        return program

    monkeypatch.setattr(pt2.torch.export, "load", damaged)
    with pytest.raises(fxquant.SaveError, match="other values in the exported program"):
        fxquant.export(quantized(), tmp_path / "m.pt2", format="pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("options", [{}, {"activation_bits": 8, "observer": "dynamic"}])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 16, 3),
        nn.Conv2d(8, 16, 1),
        nn.Conv2d(8, 16, 3, groups=2),
        nn.ConvTranspose2d(8, 16, 3),
    ],
    ids=["places", "one place", "groups", "transposed"],
)
def test_convolutions_are_in_a_standard_program(layer, options, tmp_path):
    model, x = nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(2, 8, 8, 8)
    sizes = {"group_size": 8, "skip_param_threshold": 0, "accuracy_warning": "ignore"}
    graph, _ = fxquant.quantize(model, [x], **sizes, **options)
    path = tmp_path / "m.pt2"
    fxquant.export(graph, path, format="pt2", standard=True, example_inputs=x)
    (found,) = torch.export.load(path).module()(x)
    with torch.no_grad():
        assert fxquant.sqnr_db(graph(x), found) > 110
