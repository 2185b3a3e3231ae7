"""What cannot be loaded again is not saved, and what is not whole is not loaded: both in words."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import fxquant
from fxquant.integrations.transformers import FxquantConfig
from tests.integrations import models

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    models.swapped(models.llama()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "folder")


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
def test_a_process_that_does_not_know_the_layers_loads_no_random_weights(kind, folder, monkeypatch):
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "fxquant")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        kind.from_pretrained(folder)


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def change_config(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config["quantization_config"])
    (folder / CONFIG).write_text(json.dumps(config))


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("part", ["packed_weight", "scales"])
def test_a_missing_tensor_is_refused(part, folder):
    change_tensors(folder, lambda tensors: tensors.pop(f"{Q_PROJ}.{part}"))
    with pytest.raises(fxquant.LoadError, match=rf"q_proj\.{part}: got no such tensor"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_scales_of_another_dtype_are_refused_and_not_rounded(folder):
    name = f"{Q_PROJ}.scales"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].float()}))
    with pytest.raises(fxquant.LoadError, match=r"scales of torch\.float32"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_scales_that_are_not_finite_are_refused(folder):
    change_tensors(folder, lambda tensors: tensors[f"{Q_PROJ}.scales"].fill_(float("nan")))
    with pytest.raises(fxquant.LoadError, match="a scale that is 0, NaN or Inf"):
        AutoModelForCausalLM.from_pretrained(folder)


def module_of(config, name=Q_PROJ):
    return config["layers"]["modules"][config["layers"]["layers"][name]]


WRONG = {
    "another format": (lambda c: c.update(format=99), "format 99"),
    "no such bits": (lambda c: c["options"].update(bits=7), "bits: got 7"),
    "an unknown entry": (lambda c: c.update(code="x"), "entries"),
    "no layers": (lambda c: c.pop("layers"), "no description of layers"),
    "a class of another library": (
        lambda c: module_of(c).update({"class": "subprocess.Popen"}), "subprocess.Popen",
    ),
    "a layer that the model lacks": (
        lambda c: c["layers"]["layers"].update({"model.layers.7.mlp": 0}), "does not have",
    ),
    "a number that is none": (
        lambda c: c["layers"]["layers"].update({Q_PROJ: "0"}), "not a whole number",
    ),
    "a module that is not there": (
        lambda c: c["layers"]["layers"].update({Q_PROJ: 999}), "reference to module 999",
    ),
    "another layer's module": (
        lambda c: c["layers"]["layers"].update(
            {Q_PROJ: c["layers"]["layers"]["model.layers.0.mlp.down_proj"]}
        ),
        "of another shape or kind",
    ),
    "a tensor of no dtype": (
        lambda c: c["layers"]["tensors"].update({f"{Q_PROJ}.scales": "object 2x2"}), "of the kind",
    ),
    "a tensor of no layer": (
        lambda c: c["layers"]["tensors"].update({"model.norm.x": "int8 2"}), "of no layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "text"), WRONG.values(), ids=WRONG)
def test_a_wrong_config_is_refused(change, text, folder):
    change_config(folder, change)
    with pytest.raises(fxquant.FxquantError, match=text):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"bits": 7}, "bits: got 7"), ({"method": "gptq"}, "without calibration data"),
     ({"modules_to_not_convert": ["nothing"]}, "rule 'nothing'"),
     ({"layer_types": [nn.Conv1d]}, "layer_types"),
     ({"skip_layer_names": ["*"]}, "leave every layer float")],
)  # fmt: skip
def test_options_of_no_use_are_refused(options, error, tmp_path):
    models.llama().save_pretrained(tmp_path)
    with pytest.raises(fxquant.FxquantError, match=error):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FxquantConfig(**options))


def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path):
    model = models.llama()
    model.get_submodule(Q_PROJ).weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(fxquant.WeightError, match=Q_PROJ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FxquantConfig())


def test_a_layer_with_a_hook_is_not_saved(tmp_path):
    swapped = models.swapped(models.llama())
    swapped.get_submodule(Q_PROJ).register_forward_hook(lambda *_: None)
    with pytest.raises(fxquant.SaveError, match="forward hooks"):
        swapped.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*"))


class Foreign(nn.Module):
    """A model of a library that fxquant does not know, with a way to save it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x):
        return self.inner(x)

    def save_pretrained(self, folder):
        torch.save(self.state_dict(), folder / "weights.pt")


def test_a_model_of_another_library_refuses_to_be_saved(tmp_path):
    model, _ = fxquant.quantize(
        Foreign().eval(), example_inputs=torch.randn(2, 64), into="model", **models.QUIET
    )
    with pytest.raises(fxquant.SaveError, match=r"Foreign\.save_pretrained: .*fxquant\.load_into"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*"))


def test_without_the_integration_a_swapped_model_refuses_to_be_saved(tmp_path):
    code = (
        "import sys, torch, transformers, fxquant\n"
        "from tests.integrations import models\n"
        "try:\n"
        "    models.swapped(models.llama()).save_pretrained(sys.argv[1])\n"
        "except fxquant.SaveError as error:\n"
        "    assert 'import fxquant.integrations.transformers' in str(error)\n"
        "    sys.exit(5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == 5
    assert not list(tmp_path.glob("*"))
