"""The option `fuse`: the graph of `fxquant.fuse`, with a record that says what was fused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.errors import OptionError
from fxquant.exporters.stream import for_folder
from fxquant.fusion.patterns import PATTERNS
from fxquant.integrations.huggingface.folder_config import FolderConfig

OPTIONS = {"group_size": 32, "accuracy_warning": "ignore"}
FUSED = {"attention": 1, "norm": 2, "shared input": 1, "function": 1}


class Block(nn.Module):
    """A layer of a transformer: something of every pattern."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.norm_1, self.norm_2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        projected = self.q(x), self.k(x), self.v(x)
        heads = [y.unflatten(-1, (4, 16)).transpose(1, 2) for y in projected]
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)
        x = self.norm_1(x + self.o(y))
        return self.norm_2(x + self.down(F.gelu(self.up(x))))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def data():
    return [torch.randn(8, 5, 64, generator=torch.Generator().manual_seed(1))]


def test_the_graph_is_that_of_fuse_also_from_a_file(model, data, tmp_path):
    plain, plain_info = fxquant.static_quantize(model, data, **OPTIONS)
    made, info = fxquant.static_quantize(model, data, fuse=True, **OPTIONS)
    expected = fxquant.fuse(plain)
    assert plain_info.fused == fxquant.info(plain).fused == {}
    assert info.fused == fxquant.info(made).fused == fxquant.info(expected).fused == FUSED
    assert "fused: shared input, 1\n" in f"{info}\n"
    fxquant.save_model(made, tmp_path / "made.safetensors")
    loaded = fxquant.load_model(tmp_path / "made.safetensors")
    assert fxquant.info(loaded) == info
    assert fxquant.info(loaded).config.fuse
    for graph in (expected, loaded):
        assert torch.equal(graph(data[0]), made(data[0]))
    assert {row.module for row in info.rows} == {row.module for row in plain_info.rows}


def test_the_output_is_measured_on_the_fused_graph(model, data, monkeypatch):
    measured = []
    monkeypatch.setattr(
        "fxquant.measure.measured_rows.output_sqnr",
        lambda *given, real=fxquant.measure.paired_run.output_sqnr, **options: (
            measured.append(given[1]) or real(*given, **options)
        ),
    )
    made, info = fxquant.quantize(model, data, fuse=True, method="rtn", **OPTIONS)
    assert all(graph is made for graph in measured)
    assert len(measured) == 2  # rows held out, and rows that chose the integers
    assert info.sqnr_db > 15


def test_patterns_are_named_as_their_rows_are():
    assert set(FUSED) <= {pattern.name for pattern in PATTERNS}


def test_what_has_no_graph_refuses_in_words(model, data):
    made, _ = fxquant.quantize(model, example_inputs=data[0], fuse=True, **OPTIONS)
    with pytest.raises(OptionError, match="a fused graph .* fuse=False"):
        fxquant.swap_modules(model, made)
    with pytest.raises(OptionError, match="into='model'.*Leave fuse out"):
        fxquant.quantize(model, data, into="model", fuse=True)
    with pytest.raises(OptionError, match="the target 'gguf'.*False"):
        fxquant.QuantConfig(fuse=True, target="gguf")
    with pytest.raises(OptionError, match="fuse: got True for a folder"):
        for_folder(fxquant.QuantConfig(fuse=True))
    with pytest.raises(OptionError, match="fuse: got True for a model of the library's own class"):
        FolderConfig("w4a16", fuse=True)
    with pytest.raises(OptionError, match="'yes'.*True or False"):
        fxquant.QuantConfig(fuse="yes")


@pytest.mark.parametrize("preset", ["w4a8", "w8a8"])
def test_int8_activations_fuse_too(model, data, preset):
    _, info = fxquant.quantize(model, data, preset, fuse=True, **OPTIONS)
    assert info.fused == FUSED
    assert info.sqnr_db > 15
