"""Every architecture of the zoo: quantized, run at another size, saved, and loaded without it."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxquant
from fxquant.graph.calls import Call
from fxquant.graph.channel_scaling import ScalingFinder, apply_scale
from fxquant.graph.layers import sites
from fxquant.graph.scale_rules import CannotScaleError
from fxquant.graph.structures import main_output, tensors_in
from fxquant.modules.layer import QuantizedLayer
from tests import zoo
from tests.graph.scales import random_scale

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LOADER = """
import json, sys, torch
sys.modules["transformers"] = None  # the model's library cannot be imported
import fxquant
from fxquant.graph.structures import tensors_in
from safetensors.torch import load_file
inputs, expected = load_file(sys.argv[2]), load_file(sys.argv[3])
with torch.no_grad():
    found = list(tensors_in(fxquant.load_model(sys.argv[1])(**inputs)))
print(json.dumps([torch.equal(t, expected[str(i)]) for i, t in enumerate(found)]))
"""


# In each run of the suite; `make test-models` runs all.
NAMES = list(zoo.ZOO)[: None if os.environ.get("FXQUANT_ALL_MODELS") else 32]


@pytest.fixture(scope="module", params=NAMES)
def traced(request):
    """A name, its model, and the graph: tracing is most of the time, so that two tests share it."""
    model = zoo.build(request.param)
    return request.param, model, fxquant.trace(model, zoo.inputs(request.param))


def test_it_is_quantized_runs_at_another_size_saves_and_reloads(traced, tmp_path):
    name, model, gm = traced
    data = [zoo.inputs(name), zoo.inputs(name, 3)]
    q, info = fxquant.static_quantize(
        gm, data, group_size=32, skip_param_threshold=0, accuracy_warning="ignore"
    )
    report = fxquant.trace_report(q)
    assert not report.opaque
    assert report.traced_elements["linear"] == report.product_elements["linear"]
    assert report.coverage == 1.0
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linears <= {*info.selected_layers, *info.skipped_layers}
    assert info.sqnr_db > 8
    assert not any(
        isinstance(s.module, nn.Linear) and s.name in info.selected_layers for s in sites(q)
    )

    other = zoo.inputs(name, 3, 13)
    ran = []
    for site in sites(q):
        if isinstance(site.module, QuantizedLayer):
            site.module.register_forward_hook(lambda m, a, o, n=site.name: ran.append(n))
    with torch.no_grad():
        found, expected = main_output(q(**other)), main_output(model(**other))
    assert found.shape == expected.shape
    assert fxquant.sqnr_db(expected, found) > 6
    assert set(ran) == set(info.selected_layers)
    for site in sites(q):
        site.module._forward_hooks.clear()

    path = tmp_path / "model.safetensors"
    fxquant.save_model(q, path, info)
    loaded = fxquant.load_model(path)
    with torch.no_grad():
        pairs = zip(tensors_in(loaded(**other)), tensors_in(q(**other)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert loaded.meta["fxquant_info"]["config"]["group_size"] == 32


# Layers of each architecture whose input can be scaled. Post-norm models have few.
LEAST = {"llama": 7, "gemma": 6, "gpt2": 4, "opt": 6, "phi3": 7, "t5": 16, "vit": 6, "bert": 2}


def test_all_channel_scales_together_leave_the_output(traced):
    name, _, gm = traced
    gm, call, found = copy.deepcopy(gm), zoo.inputs(name, 2, 7), 0
    for parameter in gm.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    finder = ScalingFinder(gm, Call((), call))
    with torch.no_grad():
        before = main_output(gm(**call)).clone()
        values = {
            s.node.args[0] for s in sites(gm) if isinstance(s.module, nn.Linear) and not s.is_inside
        }
        for value in sorted(values, key=str):
            try:
                scaling = finder.find(value)
            except CannotScaleError:
                continue
            apply_scale(scaling, random_scale(scaling))
            found += 1
        after = main_output(gm(**call))
    assert found >= LEAST.get(name, 0)
    assert fxquant.sqnr_db(before, after) > 100


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5", "clip"])
def test_a_process_without_the_models_library_computes_the_same_bits(name, tmp_path):
    q, info = fxquant.quantize(
        zoo.build(name), example_inputs=zoo.inputs(name), group_size=32, skip_param_threshold=0,
        accuracy_warning="ignore",
    )  # fmt: skip
    inputs = zoo.inputs(name, 2, 7)
    with torch.no_grad():
        expected = {str(i): t.clone() for i, t in enumerate(tensors_in(q(**inputs)))}
    paths = [str(tmp_path / f) for f in ("model.safetensors", "inputs", "expected")]
    fxquant.save_model(q, paths[0], info)
    save_file({k: v.contiguous() for k, v in inputs.items()}, paths[1])
    save_file({k: v.contiguous() for k, v in expected.items()}, paths[2])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADER, *paths],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    same = json.loads(result.stdout)
    assert same
    assert all(same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_narrow_models_keep_their_dtype(name, dtype):
    model = zoo.build(name, dtype)
    q, info = fxquant.static_quantize(
        model, [zoo.inputs(name)], group_size=32, skip_param_threshold=0, accuracy_warning="ignore"
    )
    with torch.no_grad():
        assert main_output(q(**zoo.inputs(name, 1, 5))).dtype == dtype
    assert info.sqnr_db > 8


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_users_class_generates_with_quantized_layers(name):
    model = zoo.build(name)
    inputs = zoo.inputs(name)
    q, _ = fxquant.static_quantize(
        model, [inputs], group_size=32, skip_param_threshold=0, accuracy_warning="ignore"
    )
    swapped = fxquant.swap_modules(model, q)
    assert type(swapped) is type(model)
    with torch.no_grad():
        assert torch.equal(swapped(**inputs).logits, q(**inputs).logits)
        generated = swapped.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 13)
    assert swapped.fxquant_left_float == []
    assert any(isinstance(m, nn.Linear) for m in model.modules()) or name == "gpt2"
