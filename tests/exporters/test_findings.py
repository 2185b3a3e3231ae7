import os
import shutil

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxquant
from fxquant.exporters import awq, compressed_tensors, gptq
from tests.exporters.conftest import IDS, SMALL
from tests.exporters.layers import int4_layer, with_layers

CHECKPOINTS = ("compressed-tensors", "gptq", "awq")


def swapped(int4, make):
    return with_layers(fxquant.swap_modules(int4.model, int4.graph), make)


def quantized(**options):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).eval()
    data = [torch.randn(8, 64)]
    return fxquant.quantize(model, data, group_size=32, accuracy_warning="ignore", **options)[0]


def test_fractional_zero_points_are_refused_and_the_remedy_works(int4, tmp_path):
    options = {"example_inputs": IDS, "group_size": 32}
    fractional, _ = fxquant.quantize(int4.model, symmetric=False, **options)
    for format in CHECKPOINTS:
        remedied, _ = fxquant.quantize(int4.model, symmetric=False, target=format, **options)
        found = fxquant.check_export(fractional, format)
        assert len([f for f in found if "zero points are not whole" in f.problem]) == 7
        assert all(f'target="{format}"' in f.remedy for f in found if f.is_loss)
        with pytest.raises(fxquant.SaveError, match=r"not whole.*and 4 more.*target="):
            fxquant.export(fractional, tmp_path / "new", format=format, base=int4.folder)
        assert list(tmp_path.iterdir()) == []
        assert [f for f in fxquant.check_export(remedied, format) if f.is_loss] == []


def test_zero_points_outside_the_integers_are_refused(int4):
    model = swapped(int4, lambda o, i: int4_layer(o, i, zero_points=lambda s: torch.full(s, -3.0)))
    assert "outside 0..15" in fxquant.check_export(model, "awq")[0].problem


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_scales_that_float16_does_not_hold_are_refused(int4, format):
    model = swapped(int4, lambda o, i: int4_layer(o, i, scale=1e-7))
    assert "no float16 number" in fxquant.check_export(model, format)[0].problem
    assert fxquant.check_export(model, "compressed-tensors") == []


@pytest.mark.parametrize("format", CHECKPOINTS)
def test_groups_that_do_not_divide_the_inputs_are_refused(int4, format):
    model = swapped(int4, lambda o, i: int4_layer(o, i, group_size=48))
    assert "do not divide its 128 inputs" in fxquant.check_export(model, format)[0].problem


def test_awq_has_no_int8(mixed):
    found = fxquant.check_export(mixed.graph, "awq")
    assert [f.where for f in found] == ["model.layers.0.mlp.down_proj", "lm_head"]
    assert "no 8 bits" in found[0].problem


def test_awq_has_one_group_size(int4):
    model = swapped(int4, lambda o, i: int4_layer(o, i, group_size=64 if i == 256 else 32))
    found = fxquant.check_export(model, "awq")
    assert {f.where.rpartition(".")[2] for f in found} == {"down_proj"}
    assert fxquant.check_export(model, "gptq") == []


@pytest.mark.parametrize("observer", ["minmax", "dynamic"])
def test_quantized_activations_are_refused_by_formats_of_weights(observer):
    graph = quantized(activation_bits=8, observer=observer)
    for format in ("gptq", "awq", "gguf"):
        found = fxquant.check_export(graph, format)
        assert {f.remedy for f in found if f.is_loss} == {"Quantize without activation_bits."}


def test_layers_that_vllm_merges_should_be_alike(int4, tmp_path):
    linears = [n for n, m in int4.model.named_modules() if isinstance(m, nn.Linear)]
    bits = {name: 8 if name.endswith("k_proj") else 4 for name in linears}
    graph, _ = fxquant.quantize(int4.model, example_inputs=IDS, bits=bits, group_size=32)
    found = fxquant.export(graph, tmp_path / "x", format="compressed-tensors", base=int4.folder)
    assert [f.where for f in found] == ["model.layers.0.self_attn.q_proj"]
    assert not found[0].is_loss


def like(**changed):
    return LlamaForCausalLM(LlamaConfig.from_dict({**SMALL.to_dict(), **changed}))


def test_the_folder_of_another_model_is_refused(int4, folder_of, tmp_path):
    shallow = folder_of(like(num_hidden_layers=0), "shallow")
    found = fxquant.check_export(int4.graph, "gptq", base=shallow)
    problems = " ".join(f.problem for f in found)
    assert "base has no tensor model.layers.0.mlp.up_proj.weight" in problems
    found = fxquant.check_export(
        int4.graph, "gptq", base=folder_of(like(intermediate_size=64), "narrow")
    )
    assert "is [64, 128], not [256, 128]" in " ".join(f.problem for f in found)
    with pytest.raises(fxquant.OptionError, match=r"no.*cannot be read.*save_pretrained"):
        fxquant.check_export(int4.graph, "gptq", base=tmp_path / "no")


def test_a_float_model_and_unknown_formats_are_refused(int4, tmp_path):
    with pytest.raises(fxquant.OptionError, match="without a quantized layer"):
        fxquant.check_export(int4.model, "gptq")
    with pytest.raises(fxquant.OptionError, match="Did you mean 'gptq'"):
        fxquant.export(int4.graph, tmp_path / "x", format="gtpq")


@pytest.mark.parametrize("module", [compressed_tensors, gptq, awq])
def test_files_that_read_back_differently_are_not_put_in_place(int4, tmp_path, monkeypatch, module):
    format = module.__name__.rpartition(".")[2].replace("_", "-")
    right = module.pack_rows

    def wrong(q, bits, *order):
        words = right(q, bits, *order)
        words[-1, -1] ^= 1
        return words

    monkeypatch.setattr(module, "pack_rows", wrong)
    with pytest.raises(fxquant.SaveError, match="other weights in the files"):
        fxquant.export(int4.graph, tmp_path / "new", format=format, base=int4.folder)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(int4, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    fxquant.export(int4.graph, new, format="gptq", base=int4.folder)  # an empty one is fine
    before = {path.name: path.stat().st_mtime_ns for path in new.iterdir()}
    with pytest.raises(fxquant.SaveError, match="something there already"):
        fxquant.export(int4.graph, new, format="gptq", base=int4.folder)
    assert {path.name: path.stat().st_mtime_ns for path in new.iterdir()} == before
    assert os.stat(new).st_mode & 0o777 == 0o777 & ~_umask()


def test_what_a_killed_export_left_is_removed_by_the_next(int4, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    monkeypatch.setattr(gptq, "pack_rows", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fxquant.export(int4.graph, tmp_path / "new", format="gptq", base=int4.folder)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    fxquant.export(int4.graph, tmp_path / "new", format="gptq", base=int4.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
