"""The consumer is transformers with the compressed-tensors package."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaForCausalLM

import fxquant
from tests.exporters.conftest import IDS, SMALL, WITH_HEAD
from tests.exporters.layers import int4_layer, quantized_layers, whole, with_layers

FORMAT = "compressed-tensors"
QUIET = {"accuracy_warning": "ignore"}


def assert_same_as_graph(folder, graph, **options):
    """Every weight is the same number, so the logits of a float product are the same bits."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        logits = loaded(**IDS).logits  # weights are unpacked by the first call
        for name, layer in quantized_layers(graph).items():
            assert torch.equal(loaded.get_submodule(name).weight, layer.dequantize())
        assert torch.equal(logits, fxquant.dequantize_model(graph)(**IDS).logits)
        assert fxquant.sqnr_db(graph(**IDS).logits, logits) > 50
    return loaded


def test_transformers_computes_what_the_graph_computes(int4, tmp_path):
    fxquant.export(int4.graph, tmp_path / "new", format=FORMAT, base=int4.folder)
    assert_same_as_graph(tmp_path / "new", int4.graph)


def test_int4_and_int8_layers_mix(mixed, tmp_path):
    findings = fxquant.export(mixed.graph, tmp_path / "new", format=FORMAT, base=mixed.folder)
    assert findings == []
    assert_same_as_graph(tmp_path / "new", mixed.graph)


def test_a_swapped_model_and_a_saved_file_give_the_same_bytes(int4, tmp_path):
    fxquant.save_model(int4.graph, tmp_path / "saved.safetensors")
    swapped = fxquant.swap_modules(int4.model, int4.graph)
    for name, model in [
        ("graph", int4.graph), ("file", tmp_path / "saved.safetensors"), ("swapped", swapped)
    ]:  # fmt: skip
        fxquant.export(model, tmp_path / name, format=FORMAT, base=int4.folder)
    for name in ("file", "swapped"):
        for part in ("model.safetensors", "config.json"):
            expected = (tmp_path / "graph" / part).read_bytes()
            assert (tmp_path / name / part).read_bytes() == expected


def test_whole_zero_points_are_stored(int4, tmp_path):
    model = fxquant.swap_modules(int4.model, int4.graph)
    with_layers(model, lambda rows, columns: int4_layer(rows, columns, zero_points=whole))
    fxquant.export(model, tmp_path / "new", format=FORMAT, base=int4.folder)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new", **options)
    for name, layer in quantized_layers(model).items():
        assert torch.equal(loaded.get_submodule(name).weight, layer.dequantize())


def test_scales_folded_into_norms_and_corrected_biases_come_along(folder_of, tmp_path):
    config = type(SMALL).from_dict({**SMALL.to_dict(), "attention_bias": True, "mlp_bias": True})
    model = LlamaForCausalLM(config).eval()
    graph, info = fxquant.quantize(model, [IDS], method="awq+rtn", **WITH_HEAD, **QUIET)
    assert info.folded_scales
    base = folder_of(model, "biased")
    assert "lm_head" in [f.where for f in fxquant.check_export(graph, FORMAT, base=base)]
    graph, _ = fxquant.quantize(model, [IDS], method="awq+rtn", group_size=32, **QUIET)
    fxquant.export(graph, tmp_path / "new", format=FORMAT, base=base)
    assert_same_as_graph(tmp_path / "new", graph)


def test_a_bias_for_which_the_class_has_no_place_is_refused(int4, tmp_path):
    graph, _ = fxquant.quantize(int4.model, [IDS], method="rtn", group_size=32, **QUIET)
    with pytest.raises(fxquant.SaveError, match=r"calibration gave it a bias.*target="):
        fxquant.export(graph, tmp_path / "new", format=FORMAT, base=int4.folder)


def test_a_head_tied_to_the_embedding_gets_a_weight_of_its_own(folder_of, tmp_path):
    config = type(SMALL).from_dict({**SMALL.to_dict(), "tie_word_embeddings": True})
    model = LlamaForCausalLM(config).eval()
    graph, _ = fxquant.quantize(model, example_inputs=IDS, **WITH_HEAD)
    assert "lm_head" in quantized_layers(graph)
    fxquant.export(graph, tmp_path / "new", format=FORMAT, base=folder_of(model, "tied"))
    loaded = assert_same_as_graph(tmp_path / "new", graph)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_large_models_are_written_in_shards(int4, tmp_path):
    fxquant.export(
        int4.graph, tmp_path / "new", format=FORMAT, base=int4.folder, max_shard_bytes=50_000
    )
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    assert len(shards) > 3
    assert_same_as_graph(tmp_path / "new", int4.graph)


def test_other_files_of_the_base_are_taken_over_and_float_weights_are_not(int4, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(int4.folder, base)
    (base / "tokenizer.json").write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "pytorch_model.bin").write_text("float weights")
    (base / ".cache").mkdir()
    (base / ".cache" / "x.json").write_text("{}")
    fxquant.export(int4.graph, tmp_path / "new", format=FORMAT, base=base)
    found = {str(p.relative_to(tmp_path / "new")) for p in (tmp_path / "new").rglob("*.*")}
    expected = {"tokenizer.json", "1_Pooling/config.json", "model.safetensors", "config.json"}
    assert expected <= found
    assert not {"pytorch_model.bin", ".cache/x.json"} & found


def test_bfloat16_models_keep_their_dtype(int4, folder_of, tmp_path):
    model = LlamaForCausalLM(SMALL).eval().to(torch.bfloat16)
    graph, _ = fxquant.quantize(model, example_inputs=IDS, group_size=32)
    fxquant.export(graph, tmp_path / "new", format=FORMAT, base=folder_of(model, "half"))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    loaded(**IDS)
    assert loaded.dtype == torch.bfloat16
    name = "model.layers.0.mlp.up_proj"
    expected = graph.get_submodule(name).dequantize().bfloat16()
    assert torch.equal(loaded.get_submodule(name).weight, expected)


@pytest.mark.parametrize("options", [{"max_shard_bytes": 0}, {"bass": "x"}, {}])
def test_options_are_checked(int4, tmp_path, options):
    with pytest.raises(fxquant.OptionError, match="max_shard_bytes|base"):
        fxquant.export(int4.graph, tmp_path / "new", format=FORMAT, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"bits": 4, "group_size": 32}, {"bits": 8, "group_size": -1}], ids=str
)
@pytest.mark.usefixtures("float32_products")
def test_activations_that_are_rounded_while_the_model_runs(options, int4, tmp_path):
    """W4A8 and W8A8: the folder says which inputs share a scale, and transformers rounds these."""
    chosen = {**options, "activation_bits": 8, "observer": "dynamic", "method": "rtn", **QUIET}
    graph, _ = fxquant.quantize(int4.model, [IDS], target=FORMAT, **chosen)
    (advice,) = fxquant.export(graph, tmp_path / "new", format=FORMAT, base=int4.folder)
    assert not advice.is_loss
    assert "vLLM" in advice.problem
    ours, exact = graph(**IDS).logits, fxquant.dequantize_model(graph)(**IDS).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    with torch.no_grad():
        theirs = loaded(**IDS).logits
    for name, layer in quantized_layers(graph).items():
        assert torch.equal(loaded.get_submodule(name).weight, layer.dequantize())
    # They divide a range into 255 steps and we into 254: one rounding is as far from floats as the
    # other, and their distance that of two roundings.
    cost = fxquant.sqnr_db(exact, ours)
    assert cost < 60
    assert fxquant.sqnr_db(exact, theirs) == pytest.approx(cost, abs=3)
    assert fxquant.sqnr_db(ours, theirs) > cost - 6

    back = fxquant.load_checkpoint(tmp_path / "new")
    assert torch.equal(back(**IDS).logits, ours)
    fxquant.export(back, tmp_path / "again", format=FORMAT, base=int4.folder)
    for part in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / part).read_bytes() == (tmp_path / "new" / part).read_bytes()


def test_ranges_of_activations_that_calibration_found_are_refused(int4, tmp_path):
    graph, _ = fxquant.quantize(
        int4.model, [IDS], activation_bits=8, observer="minmax", zero_points="integer", **QUIET
    )
    with pytest.raises(fxquant.SaveError, match='no grid for each channel.*observer="dynamic"'):
        fxquant.export(graph, tmp_path / "new", format=FORMAT, base=int4.folder)
    with pytest.raises(fxquant.OptionError, match="ranges that are dynamic"):
        fxquant.QuantConfig(target=FORMAT, activation_bits=8, observer="minmax")


def test_a_folder_that_rounds_inputs_as_no_layer_of_ours_does_is_read_with_a_warning(
    int4, tmp_path
):
    fxquant.export(int4.graph, tmp_path / "new", format=FORMAT, base=int4.folder)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["input_activations"] = {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="read floats: the folder rounds what they read"):
        back = fxquant.load_checkpoint(tmp_path / "new")
    assert {layer.activation for layer in quantized_layers(back).values()} == {"float"}
