"""Folders in other formats, read into our layers in the user's class."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxquant
from tests.exporters.conftest import IDS, SMALL
from tests.exporters.layers import int4_layer, quantized_layers, whole, with_layers

FORMATS = ("compressed-tensors", "gptq", "awq")


def logits(model):
    with torch.no_grad():
        found = model(**IDS)
    return found["logits"] if isinstance(found, dict) else found.logits


def exported(model, base, folder, format):
    fxquant.export(model, folder, format=format, base=base)
    return folder


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_exported_comes_back_to_the_bit(int4, mixed, tmp_path, format):
    made = int4 if format == "awq" else mixed
    folder = exported(made.graph, made.folder, tmp_path / "new", format)
    model = LlamaForCausalLM(SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for loaded in (fxquant.load_checkpoint(folder, model), fxquant.load_checkpoint(folder)):
        assert isinstance(loaded, LlamaForCausalLM)
        assert torch.equal(logits(loaded), made.graph(**IDS)["logits"])
        assert loaded.generate(**IDS, max_new_tokens=3, do_sample=False).shape == (2, 19)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert quantized_layers(model) == {}


@pytest.mark.parametrize("format", FORMATS)
def test_whole_zero_points_come_back(int4, tmp_path, format):
    model = fxquant.swap_modules(int4.model, int4.graph)
    with_layers(model, lambda rows, columns: int4_layer(rows, columns, zero_points=whole))
    loaded = fxquant.load_checkpoint(exported(model, int4.folder, tmp_path / "new", format))
    for name, layer in quantized_layers(model).items():
        found = loaded.get_submodule(name)
        assert not found.symmetric
        assert torch.equal(found.dequantize(), layer.dequantize())


def test_one_format_becomes_another(int4, tmp_path):
    one = exported(int4.graph, int4.folder, tmp_path / "one", "awq")
    exported(one, int4.folder, tmp_path / "two", "gptq")
    loaded = fxquant.load_checkpoint(tmp_path / "two")
    assert torch.equal(logits(loaded), int4.graph(**IDS)["logits"])


def test_a_loaded_model_can_be_traced_and_compared(int4, tmp_path):
    folder = exported(int4.graph, int4.folder, tmp_path / "new", "gptq")
    graph = fxquant.trace(fxquant.load_checkpoint(folder), IDS)
    assert torch.equal(logits(graph), int4.graph(**IDS)["logits"])


def changed(folder, new, edit):
    shutil.copytree(folder, new)
    tensors = load_file(new / "model.safetensors")
    edit(tensors)
    save_file(tensors, new / "model.safetensors", {"format": "pt"})
    return new


NAME = "model.layers.0.mlp.up_proj"


def test_scales_with_more_digits_are_rounded_and_told(int4, tmp_path):
    folder = exported(int4.graph, int4.folder, tmp_path / "one", "gptq")

    def finer(tensors):
        tensors[f"{NAME}.scales"] *= 1.003

    new = changed(folder, tmp_path / "two", finer)
    with pytest.warns(
        fxquant.RoundedScalesWarning, match=rf"1 layers .*{NAME} are equal to 5\d dB"
    ):
        fxquant.load_checkpoint(new)


def test_columns_in_another_order_are_refused(int4, tmp_path):
    folder = exported(int4.graph, int4.folder, tmp_path / "one", "gptq")

    def reordered(tensors):
        tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"].flip(0).contiguous()

    with pytest.raises(fxquant.LoadError, match=r"desc_act"):
        fxquant.load_checkpoint(changed(folder, tmp_path / "two", reordered))


def test_other_folders_and_other_models_are_refused(int4, tmp_path):
    with pytest.raises(fxquant.LoadError, match="a float checkpoint"):
        fxquant.load_checkpoint(int4.folder)
    folder = exported(int4.graph, int4.folder, tmp_path / "new", "gptq")
    for values, text in (
        ({"num_hidden_layers": 0}, "no module of that name"),
        ({"num_hidden_layers": 2}, "no tensor model.layers.1"),
        ({"intermediate_size": 128}, "a weight of .*Expected one of"),
        ({"vocab_size": 32}, "size mismatch"),
    ):
        other = LlamaForCausalLM(LlamaConfig.from_dict({**SMALL.to_dict(), **values}))
        with pytest.raises(fxquant.LoadError, match=text):
            fxquant.load_checkpoint(folder, other)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(fxquant.LoadError, match=r"'bitsandbytes'.*Expected one of compressed"):
        fxquant.load_checkpoint(folder, nn.Linear(2, 2))
