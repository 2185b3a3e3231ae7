"""Folders of diffusers with fxquant's layers: the same bits, or an error in words."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

import fxquant
from fxquant.integrations.diffusers import FxquantDiffusersConfig
from fxquant.passes.rounded_layers import RoundedLayers
from tests.integrations import models

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = FxquantDiffusersConfig(bits=4, group_size=32, skip_param_threshold=0)


def transformer():
    model = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=32, out_channels=4, pos_embed_max_size=4,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 4, 4), "encoder_hidden_states": torch.randn(2, 3, 32),
        "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([3, 5]),
    }  # fmt: skip


def unet():
    model = UNet2DConditionModel(
        sample_size=4, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(2, 4, 4, 4), "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(2, 5, 32),
    }  # fmt: skip


def autoencoder():
    model = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, sample_size=4)
    return model, {"sample": torch.randn(2, 3, 4, 4)}


MODELS = {"transformer": transformer, "unet": unet, "autoencoder": autoencoder}


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    model, inputs = MODELS[request.param]()
    return model.eval(), inputs


@torch.no_grad()
def output(model, inputs):
    return model(**inputs).sample


def test_a_swapped_model_is_loaded_with_the_same_bits_and_can_be_saved_again(tmp_path):
    torch.manual_seed(0)
    model, inputs = transformer()
    swapped, _ = fxquant.quantize(
        model.eval(), example_inputs=inputs, into="model", group_size=32, skip_param_threshold=0,
        accuracy_warning="ignore",
    )  # fmt: skip
    before, expected = (set(vars(swapped)), dict(swapped.config)), output(swapped, inputs)
    swapped.save_pretrained(tmp_path / "one")
    assert (set(vars(swapped)), dict(swapped.config)) == before
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two", max_shard_size="20KB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "two")
    for found in (loaded, again):
        assert models.layers(found).keys() == models.layers(swapped).keys()
        assert torch.equal(output(found, inputs), expected)
        assert (found.dtype, found.device.type) == (torch.float32, "cpu")


def test_a_float_folder_is_quantized_while_it_is_loaded(case, tmp_path):
    model, inputs = case
    model.save_pretrained(tmp_path / "float")
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=CONFIG)
    rounded, layers = RoundedLayers(CONFIG.config), models.layers(loaded)
    assert len(layers) > 4
    for path, layer in layers.items():
        expected = rounded.quantize(path, model.get_submodule(path), layer.bits)
        assert torch.equal(layer.dequantize(), expected.dequantize())
    loaded.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized")
    assert torch.equal(output(again, inputs), output(loaded, inputs))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model that was quantized while it was loaded, and its folder."""
    folder = tmp_path_factory.mktemp("diffusers")
    transformer()[0].save_pretrained(folder / "float")
    model = SD3Transformer2DModel.from_pretrained(folder / "float", quantization_config=CONFIG)
    model.save_pretrained(folder / "quantized")
    return model, folder / "quantized"


def test_the_rest_is_loaded_in_the_dtype_that_is_asked_for(made, monkeypatch):
    monkeypatch.setattr(SD3Transformer2DModel, "_keep_in_fp32_modules", ["proj_out"])
    loaded = SD3Transformer2DModel.from_pretrained(made[1], torch_dtype=torch.bfloat16)
    for path, layer in models.layers(loaded).items():
        kept = path == "proj_out"
        assert layer.weight.dtype == (torch.float32 if kept else torch.bfloat16)
        original = made[0].get_submodule(path).quantized_weight
        for name in ("packed", "scales"):  # which dtype= leaves as they are
            assert torch.equal(getattr(layer.quantized_weight, name), getattr(original, name))
    assert loaded.norm_out.linear.weight.dtype == torch.bfloat16


def test_a_device_map_places_the_layers(made):
    _, inputs = transformer()
    loaded = SD3Transformer2DModel.from_pretrained(made[1], device_map={"": "cpu"})
    assert torch.equal(output(loaded, inputs), output(made[0], inputs))
    with pytest.raises(fxquant.LoadError, match="device_map: got parts of the model that stay on"):
        SD3Transformer2DModel.from_pretrained(made[1], device_map={"": "disk"})


def test_a_pipeline_saves_and_loads_its_models(tmp_path):
    torch.manual_seed(0)
    sizes = {"block_out_channels": (32,), "layers_per_block": 1, "norm_num_groups": 8}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    UNet2DModel(sample_size=4, **sizes, **blocks).save_pretrained(tmp_path / "float")
    quantized = UNet2DModel.from_pretrained(tmp_path / "float", quantization_config=CONFIG)
    pipeline = DDPMPipeline(quantized, DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "pipeline", variant="small")
    assert (tmp_path / "pipeline" / "unet" / WEIGHTS.replace(".", ".small.")).exists()
    loaded = DDPMPipeline.from_pretrained(tmp_path / "pipeline", variant="small")
    inputs = {"sample": torch.randn(1, 3, 4, 4), "timestep": 3}
    assert models.layers(loaded.unet).keys() == models.layers(quantized).keys()
    assert torch.equal(output(loaded.unet, inputs), output(quantized, inputs))


def test_a_process_that_does_not_know_the_layers_refuses_the_folder(made, monkeypatch):
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "fxquant")
    with pytest.raises(ValueError, match="Unknown quantization type, got fxquant"):
        SD3Transformer2DModel.from_pretrained(made[1])


def remove(tensors, config):
    tensors.pop("proj_out.scales")


def reshape(tensors, config):
    tensors["proj_out.scales"] = torch.ones(3, dtype=tensors["proj_out.scales"].dtype)


def rename(tensors, config):
    config["layers"]["layers"]["elsewhere"] = config["layers"]["layers"]["proj_out"]


def forget(tensors, config):
    config.pop("layers")


@pytest.mark.parametrize(
    ("damage", "text"),
    [(remove, r"proj_out\.scales: got no such tensor"), (rename, "'elsewhere'.*does not have"),
     (reshape, r"proj_out\.scales: got a tensor of \[3\]"), (forget, "no description of layers")],
)  # fmt: skip
def test_a_damaged_folder_is_refused(damage, text, made, tmp_path):
    tensors = load_file(made[1] / WEIGHTS)
    config = json.loads((made[1] / "config.json").read_text())
    damage(tensors, config["quantization_config"])
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(fxquant.LoadError, match=text):
        SD3Transformer2DModel.from_pretrained(tmp_path)
