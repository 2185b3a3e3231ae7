"""Folders that call parameters otherwise than the model's class, and have experts one by one."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import fxquant
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.errors import OptionError
from fxquant.exporters.compressed_tensors import CompressedTensors
from fxquant.exporters.folder_reader import FolderReader
from fxquant.exporters.meta_model import meta_model
from fxquant.exporters.model_weights import ModelWeights
from fxquant.graph.layers import sites
from fxquant.modules.linear import QuantizedLinear

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
MIXTURES = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen3Moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                 "head_dim": 32},
    "GraniteMoe": {"num_local_experts": 3},
}  # fmt: skip
OPTIONS = {"group_size": 32, "accuracy_warning": "ignore"}


def made(kind, **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **sizes})
    return AutoModelForCausalLM.from_config(config).eval()


def data():
    """Rows enough that each expert meets more tokens than it has inputs."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (8, 32), generator=generator)} for _ in range(3)]


@pytest.fixture(params=MIXTURES)
def mixture(request, tmp_path):
    model = made(request.param, **MIXTURES[request.param])
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    return model, tmp_path / "source"


def filled(folder):
    """The class of a new folder with the weights that it holds, dequantized."""
    model = meta_model(folder, "")
    reader = FolderReader(folder)
    source = FolderReader(folder.parent / "source")

    def read(name):
        layer = name.removesuffix(".weight")
        if reader.has(f"{layer}.weight_packed"):
            return CompressedTensors().read_layer(reader, layer).weight()
        return reader.tensor(name)

    with ModelWeights(source, model).filled(model, read):
        tensors = {name: t.clone() for name, t in model.state_dict().items()}
    return tensors


def test_values_are_those_that_transformers_loads(mixture):
    model, folder = mixture
    empty = meta_model(folder, "")
    weights = ModelWeights(FolderReader(folder), empty)
    weights.check()
    with weights.filled(empty):
        for name, value in model.state_dict().items():
            assert torch.equal(empty.state_dict()[name], value), name


def test_matrices_of_experts_are_rounded_where_the_folder_has_them_one_by_one(mixture, tmp_path):
    _, folder = mixture
    info = fxquant.quantize_checkpoint(folder, tmp_path / "new", OPTIONS)
    old, new = FolderReader(folder), FolderReader(tmp_path / "new")
    one_by_one = [n for n in old.files if ".experts." in n and n.endswith(".weight")]
    for name in one_by_one:
        layer = name.removesuffix(".weight")
        expected = round_to_nearest(old.tensor(name), group_size=32).dequantize()
        assert torch.equal(CompressedTensors().read_layer(new, layer).weight(), expected)
    decisions = {d.module: d for d in info.decisions}
    experts = [d for name, d in decisions.items() if ".experts." in name]
    assert len(experts) == 4
    assert {d.action for d in experts} == {"int4" if one_by_one else "float"}
    if not one_by_one:  # Granite's folder has all of them in one tensor
        assert "holds no experts" in experts[0].reason
        assert any("product weights stay float" in text for text in info.warnings)
    routers = [n.removesuffix(".weight") for n in old.files if "router" in n or ".gate.weight" in n]
    ignored = new.config["quantization_config"]["ignore"]
    assert routers
    assert set(routers) <= set(ignored)


@pytest.mark.usefixtures("float32_products")
def test_with_data_experts_are_fitted(mixture, tmp_path):
    model, folder = mixture
    options = {**OPTIONS, "method": "gptq"}
    info = fxquant.quantize_checkpoint(folder, tmp_path / "new", options, data())
    fxquant.quantize_checkpoint(folder, tmp_path / "plain", OPTIONS)
    qmodel, _ = fxquant.quantize(model, data(), options, target="compressed-tensors")
    found = filled(tmp_path / "new")
    for site in sites(qmodel):  # before the first experts, which quantize leaves float
        if site.name.startswith("model.layers.0.self_attn"):
            same = site.module.dequantize() == found[f"{site.name}.weight"]
            assert same.float().mean() > 0.99, site.name
    fitted = [d for d in info.decisions if d.bits is not None and "to nearest" not in d.reason]
    assert len(fitted) == len(info.selected_layers)
    fitted_db, plain_db = output_sqnr(model, found), output_sqnr(model, filled(tmp_path / "plain"))
    assert fitted_db > plain_db + 1


@torch.no_grad()
def output_sqnr(model, tensors):
    """Of the model with other weights, on tokens that chose no integer."""
    tokens = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(2))
    expected = model(tokens).logits
    other = type(model)(model.config).eval()
    other.load_state_dict(tensors)
    return fxquant.sqnr_db(expected, other(tokens).logits)


def test_transformers_loads_what_was_made_of_a_mixture(tmp_path):
    pytest.importorskip("compressed_tensors")
    model = made("Mixtral", **MIXTURES["Mixtral"])
    model.save_pretrained(tmp_path / "source")
    fxquant.quantize_checkpoint(tmp_path / "source", tmp_path / "new", OPTIONS, data())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    model.load_state_dict(filled(tmp_path / "new"))
    tokens = data()[0]["input_ids"]
    with torch.no_grad():
        assert fxquant.sqnr_db(model(tokens).logits, loaded(tokens).logits) > 100


@pytest.mark.usefixtures("float32_products")
def test_the_new_folder_comes_back_in_our_layers(mixture, tmp_path):
    model, folder = mixture
    info = fxquant.quantize_checkpoint(folder, tmp_path / "new", OPTIONS)
    loaded = fxquant.load_checkpoint(tmp_path / "new")
    packed = [m for m in loaded.modules() if isinstance(m, QuantizedLinear)]
    experts = [d for d in info.decisions if ".experts." in d.module and d.bits]
    assert len(packed) == len(info.selected_layers) + 2 * len(experts)  # of three each
    model.load_state_dict(filled(tmp_path / "new"))
    tokens = data()[0]["input_ids"]
    with torch.no_grad():
        assert fxquant.sqnr_db(model(tokens).logits, loaded(tokens).logits) > 100


def test_names_that_changed_alone(tmp_path):
    """LLaVA's folders have the layers of its language model under another prefix."""
    text = {**SIZES, "model_type": "llama"}
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 96,
              "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
              "projection_dim": 32}  # fmt: skip
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=1)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "source")
    info = fxquant.quantize_checkpoint(tmp_path / "source", tmp_path / "new", OPTIONS)
    old, new = FolderReader(tmp_path / "source"), FolderReader(tmp_path / "new")
    assert set(old.files).isdisjoint(f"{n}.weight" for n in info.selected_layers if "lang" in n)
    packed = [n for n in new.files if n.endswith("weight_packed")]
    assert len(packed) == len(info.selected_layers) > 14
    named = json.dumps(new.config["quantization_config"])
    assert "lm_head" in named


def test_a_tensor_that_is_missing_is_named(tmp_path):
    model = made("Mixtral", **MIXTURES["Mixtral"])
    model.save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"num_local_experts": 5}))
    with pytest.raises(OptionError, match=r"experts\.gate_up_proj"):
        fxquant.quantize_checkpoint(tmp_path / "source", tmp_path / "new", OPTIONS)
    assert not (tmp_path / "new").exists()
    assert issubclass(type(model), PreTrainedModel)
