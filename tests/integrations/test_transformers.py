"""Folders of transformers with fxquant's layers: the same bits, whichever way a model goes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, T5EncoderModel

import fxquant
from fxquant.integrations.transformers import FxquantConfig
from fxquant.modules.grouped_linear import GroupedLinear
from fxquant.modules.packed_parameter import parameter_name
from fxquant.passes.rounded_layers import RoundedLayers
from tests.integrations import models

ROOT = Path(__file__).parents[2]
INT8 = {"bits": 8, "embeddings": 8}
ASYMMETRIC = {"symmetric": False, "embeddings": 4}
INT3 = {"bits": 3, "activation_bits": 8}


def float_layer(model, path):
    """The layer of a model at the path of a quantized one."""
    parameter = parameter_name(path)
    if parameter is None:
        return model.get_submodule(path)
    return GroupedLinear.on(model.get_parameter(parameter))


CASES = [
    ("llama", {}), ("llama", INT3), ("tied", ASYMMETRIC), ("bert", INT8), ("t5", {}),
    ("mixtral", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), [*CASES, ("gpt2", INT8)])
def test_a_swapped_model_is_loaded_with_the_same_bits_and_can_be_saved_again(
    name, options, tmp_path
):
    swapped = models.swapped(models.MODELS[name](), **options)
    expected, dtype = models.logits(swapped), swapped.dtype
    swapped.save_pretrained(tmp_path / "one")
    loaded = type(swapped).from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    again = type(swapped).from_pretrained(tmp_path / "two")
    for model in (loaded, again):
        assert models.layers(model).keys() == models.layers(swapped).keys()
        assert torch.equal(models.logits(model), expected)
        assert (model.dtype, model.device.type) == (dtype, "cpu")


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_float_folder_is_quantized_while_it_is_loaded(name, options, tmp_path):
    model = models.MODELS[name]()
    model.save_pretrained(tmp_path)
    config = FxquantConfig(**{"group_size": 32, **options})
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    found = models.layers(loaded)
    assert found.keys() == models.layers(models.swapped(model, **options)).keys()
    rounded = RoundedLayers(config.config)
    for path, layer in found.items():
        expected = rounded.quantize(path, float_layer(model, path), layer.bits)
        assert torch.equal(layer.dequantize(), expected.dequantize())
    loaded.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized")
    assert torch.equal(models.logits(again), models.logits(loaded))


def test_what_is_quantized_while_loading_has_the_bits_of_quantize_checkpoint(tmp_path):
    models.llama().save_pretrained(tmp_path / "float")
    options = {"group_size": 32, "target": "compressed-tensors"}
    fxquant.quantize_checkpoint(tmp_path / "float", tmp_path / "packed", options)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    ours = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=FxquantConfig(options)
    )
    models.logits(packed)  # its weights are unpacked at the first call
    for path, layer in models.layers(ours).items():
        assert torch.equal(layer.dequantize(), packed.get_submodule(path).weight)


def test_a_mapping_of_bits_says_what_each_layer_gets(tmp_path):
    models.llama(tied=True).save_pretrained(tmp_path)
    bits = {"model.embed_tokens": 8, "lm_head": 4, "*.q_proj": 2}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FxquantConfig(bits=bits, group_size=32)
    )
    widths = {path.rpartition(".")[2]: m.bits for path, m in models.layers(loaded).items()}
    assert widths == {"embed_tokens": 8, "lm_head": 4, "q_proj": 2}


def test_a_head_that_is_tied_shares_the_packed_rows_of_the_embedding(tmp_path):
    model = models.llama(tied=True)
    models.swapped(model, bits=8, embeddings=8).save_pretrained(tmp_path / "swapped")
    model.save_pretrained(tmp_path / "float")
    config = FxquantConfig(bits=8, embeddings=8)
    for folder, more in (("swapped", {}), ("float", {"quantization_config": config})):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder, **more)
        assert loaded.model.embed_tokens.table is loaded.lm_head


@pytest.mark.parametrize("kind", ["swapped", "float"])
def test_the_rest_is_loaded_in_the_dtype_that_is_asked_for(kind, tmp_path):
    model = models.llama()
    saved = models.swapped(model) if kind == "swapped" else model
    saved.save_pretrained(tmp_path)
    config = {} if kind == "swapped" else {"quantization_config": FxquantConfig(group_size=32)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **config)
    assert models.logits(loaded).dtype == torch.bfloat16
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {layer.weight.dtype for layer in models.layers(loaded).values()} == {torch.bfloat16}
    if kind == "swapped":
        expected = saved.bfloat16()
        # transformers keeps the frequencies of rotary embeddings in float32.
        expected.model.rotary_emb.inv_freq = loaded.model.rotary_emb.inv_freq
        assert torch.equal(models.logits(loaded), models.logits(expected))


def test_layers_that_a_class_keeps_in_float32_stay_so(tmp_path):
    models.swapped(models.t5()).save_pretrained(tmp_path)
    loaded = T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float16)
    block = loaded.encoder.block[0].layer
    assert block[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert block[0].SelfAttention.q.weight.dtype == torch.float16


def test_generate_gives_the_same_tokens(tmp_path):
    swapped = models.swapped(models.llama())
    swapped.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected, found = (
        m.generate(**models.IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for m in (swapped, loaded)
    )
    assert torch.equal(found, expected)


def test_the_base_model_is_loaded_from_the_folder_of_one_with_a_head(tmp_path):
    swapped = models.swapped(models.llama(), skip_layer_names=[])
    swapped.save_pretrained(tmp_path / "head")
    swapped.model.save_pretrained(tmp_path / "base")
    expected = swapped.model(**models.IDS).last_hidden_state
    for folder in ("head", "base"):
        loaded = AutoModel.from_pretrained(tmp_path / folder)
        assert torch.equal(loaded(**models.IDS).last_hidden_state, expected)


def test_a_part_of_a_loaded_model_saves_what_loads_again(tmp_path):
    models.swapped(models.llama()).save_pretrained(tmp_path / "all")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "all")
    loaded.model.save_pretrained(tmp_path / "part")
    part = AutoModel.from_pretrained(tmp_path / "part")
    found, expected = (m(**models.IDS).last_hidden_state for m in (part, loaded.model))
    assert torch.equal(found, expected)


def test_saving_leaves_the_model_and_its_config_as_they_were(tmp_path):
    swapped = models.swapped(models.llama())
    before = swapped.config.to_dict(), set(vars(swapped))
    swapped.save_pretrained(tmp_path)
    after = swapped.config.to_dict(), set(vars(swapped))
    for config in (before[0], after[0]):
        config.pop("architectures"), config.pop("dtype")  # which transformers itself sets
    assert after == before


def test_a_process_that_imports_nothing_else_loads_the_folder(tmp_path):
    swapped = models.swapped(models.bert(), embeddings=8)
    swapped.save_pretrained(tmp_path)
    torch.save((models.IDS, models.logits(swapped)), tmp_path / "expected.pt")
    code = (
        "import sys, torch, transformers, fxquant.integrations.transformers\n"
        "model = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1])\n"
        "inputs, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert torch.equal(model(**inputs).logits, expected)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
