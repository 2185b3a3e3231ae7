"""Whatever is made of a quantized graph computes what the graph does.

A file, a copy of the user's class, a model that a file is loaded into, a folder of transformers, a
fused graph and a copy of the graph are compared with it, for each kind of config.
"""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import fxquant
from tests import zoo

pytest.importorskip("fxquant.integrations.transformers")
MODELS = ("bert", "llama", "mixtral")
CONFIGS = {
    "4 bits": {},
    "fitted, asymmetric": {"method": "gptq", "symmetric": False},
    "3 bits, one group a row": {"bits": 3, "group_size": -1},
    "static activations": {"bits": 8, "activation_bits": 8},
    "dynamic activations": {"activation_bits": 8, "observer": "dynamic"},
    "scaled channels": {"method": "smoothquant", "bits": 8, "activation_bits": 8},
    "embeddings": {"embeddings": 8, "method": "best"},
    "head": {"bits": {"*": 4, "lm_head": 8}, "embeddings": 4},
}
OPTIONS = {
    "group_size": 32, "method": "rtn", "skip_param_threshold": 0, "accuracy_warning": "ignore",
}  # fmt: skip
FUSED_DB = 60  # fused sums are in another order, and may be rounded to bfloat16 afterwards


@cache
def traced(name: str) -> tuple[nn.Module, torch.fx.GraphModule]:
    model = zoo.build(name)
    return model, fxquant.trace(model, zoo.inputs(name))


def values(model: nn.Module, name: str) -> Tensor:
    output = model(**zoo.inputs(name))
    return output[next(iter(output))] if isinstance(output, dict) else output[0]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_route_has_the_bits_of_the_graph(name, config, tmp_path):
    model, float_graph = traced(name)
    batches = [zoo.inputs(name) for _ in range(6)]
    options = {**OPTIONS, **CONFIGS[config]}
    if config == "head" and not hasattr(model, "lm_head"):
        options["bits"] = 4
    graph, info = fxquant.quantize(float_graph, batches, **options)
    expected = values(graph, name)
    file = tmp_path / "model.safetensors"
    fxquant.save_model(graph, file, info)
    swapped = fxquant.swap_modules(model, graph)
    assert swapped.fxquant_left_float == swapped.fxquant_float_inputs == []
    swapped.save_pretrained(tmp_path / "folder")
    routes = {
        "file": fxquant.load_model(file),
        "copy of the graph": copy.deepcopy(graph),
        "swapped": swapped,
        "copy of that": copy.deepcopy(swapped),
        "loaded into": fxquant.load_into(zoo.build(name), file),
        "folder": type(model).from_pretrained(tmp_path / "folder").eval(),
    }
    assert [r for r, made in routes.items() if not torch.equal(values(made, name), expected)] == []
    fused = values(fxquant.fuse(graph), name)
    error = (fused - expected).square().sum()
    assert 10 * torch.log10(expected.square().sum() / error) > FUSED_DB
