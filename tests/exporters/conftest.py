from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from transformers import LlamaConfig, LlamaForCausalLM

import fxquant

IDS = {"input_ids": torch.randint(0, 64, (2, 16))}
SMALL = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=64,
)

WITH_HEAD = {"group_size": 32, "skip_layer_names": []}


@dataclass
class Exported:
    """A float model, its folder, and its quantized graph."""

    model: nn.Module
    folder: Path
    graph: GraphModule


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Saves a float model as a Hugging Face folder."""

    def save(model: nn.Module, name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def int4(folder_of):
    """Every Linear but the head in INT4, in groups of 32."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(SMALL).eval()
    graph, _ = fxquant.quantize(
        model, example_inputs=IDS, group_size=32, modules_to_not_convert=["lm_head"]
    )
    return Exported(model, folder_of(model, "int4"), graph)


@pytest.fixture(scope="session")
def mixed(int4):
    """One layer in INT8, and the head."""
    linears = [name for name, m in int4.model.named_modules() if isinstance(m, nn.Linear)]
    eight = ("model.layers.0.mlp.down_proj", "lm_head")
    bits = {name: 8 if name in eight else 4 for name in linears}
    graph, _ = fxquant.quantize(int4.model, example_inputs=IDS, bits=bits, **WITH_HEAD)
    return Exported(int4.model, int4.folder, graph)
