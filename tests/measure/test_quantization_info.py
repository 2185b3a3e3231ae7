import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import OptionError
from tests import models


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    data = [torch.randn(8, models.WIDTH) for _ in range(4)]
    return fxquant.static_quantize(
        models.Plain(), data, group_size=32, bits={"first": 8, "second": 4}, method="awq+gptq",
        accuracy_warning="ignore",
    )  # fmt: skip


def test_a_quantized_graph_gives_its_record_back(quantized):
    graph, info = quantized
    assert fxquant.info(graph) == info


def test_a_loaded_graph_gives_its_record_back(quantized, tmp_path):
    graph, info = quantized
    odd = replace(
        info, sqnr_db=math.inf, rows=[replace(r, output_errors={4: -math.inf}) for r in info.rows]
    )
    fxquant.save_model(graph, tmp_path / "m.safetensors", odd)
    assert fxquant.info(fxquant.load_model(tmp_path / "m.safetensors")) == odd


@pytest.mark.parametrize("model", [nn.Linear(3, 3), fxquant.trace(nn.Linear(3, 3))])
def test_what_carries_no_record_is_refused_with_a_remedy(model):
    with pytest.raises(OptionError, match="keep the graph beside it"):
        fxquant.info(model)
