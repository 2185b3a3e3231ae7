"""The readers here take one number at a time out of the files, from the formats' descriptions."""

import json

import pytest
import torch
from safetensors.torch import load_file

import fxquant
from tests.exporters.layers import (
    int4_layer,
    naive_awq,
    naive_gptq,
    quantized_layers,
    whole,
    with_layers,
)

NAMES = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")


def written(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return load_file(folder / "model.safetensors"), config


def test_gptq_holds_int4_and_int8(mixed, tmp_path):
    fxquant.export(mixed.graph, tmp_path / "new", format="gptq", base=mixed.folder)
    tensors, config = written(tmp_path / "new")
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    assert config["checkpoint_format"] == "gptq"
    eight = {r"+:^model\.layers\.0\.mlp\.down_proj$", r"+:^lm_head$"}
    assert set(config["dynamic"]) == eight
    for name, bits in zip(NAMES, (4, 8), strict=True):
        expected = mixed.graph.get_submodule(name).dequantize()
        assert torch.equal(naive_gptq(tensors, name, bits, offset=1), expected)


def test_asymmetric_gptq_is_version_2_and_told_of_vllm(int4, tmp_path):
    model = fxquant.swap_modules(int4.model, int4.graph)
    with_layers(model, lambda rows, columns: int4_layer(rows, columns, zero_points=whole))
    findings = fxquant.export(model, tmp_path / "new", format="gptq", base=int4.folder)
    assert {f.is_loss for f in findings} == {False}
    assert "vLLM refuses" in str(findings[0])
    tensors, config = written(tmp_path / "new")
    assert config["checkpoint_format"] == "gptq_v2"
    assert config["dynamic"] == {r"-:^lm_head$": {}}
    expected = model.get_submodule(NAMES[0]).dequantize()
    assert torch.equal(naive_gptq(tensors, NAMES[0], 4, offset=0), expected)


@pytest.mark.parametrize("zero_points", [None, whole])
def test_awq_holds_int4(int4, tmp_path, zero_points):
    model = fxquant.swap_modules(int4.model, int4.graph)
    with_layers(model, lambda rows, columns: int4_layer(rows, columns, zero_points=zero_points))
    fxquant.export(model, tmp_path / "new", format="awq", base=int4.folder)
    tensors, config = written(tmp_path / "new")
    assert config["modules_to_not_convert"] == ["lm_head"]
    for name in NAMES:
        expected = quantized_layers(model)[name].dequantize()
        assert torch.equal(naive_awq(tensors, name, config["group_size"]), expected)
