"""Parts of a model of the user's class, fused where their code is a function of one tensor."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.modules.gated_linear import GatedLinear
from tests.integrations import models


class Gate(nn.Module):
    """SwiGLU, as language models have it; `change` says what else a test lets it do."""

    def __init__(self, change=lambda self, x: x):
        super().__init__()
        self.gate, self.up = nn.Linear(64, 96), nn.Linear(64, 96)
        self.down, self.change = nn.Linear(96, 64), change

    def forward(self, x):
        x = self.change(self, x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Norm(nn.Module):
    """RMSNorm, written out."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64))

    def forward(self, x):
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * y.to(x.dtype)


class Block(nn.Module):
    """Parts, around which there is code that is no function of one tensor."""

    def __init__(self, gate):
        super().__init__()
        self.norm, self.gate = Norm(), gate

    def forward(self, x, scale=1.0):
        return x + scale * self.gate(self.norm(x))


def swapped(gate, dtype=torch.float32):
    """A model with quantized layers in the user's class, and what it takes."""
    torch.manual_seed(0)
    model, x = Block(gate).eval().to(dtype), torch.randn(2, 5, 64).to(dtype)
    graph, _ = fxquant.quantize(model, example_inputs=x, group_size=32, accuracy_warning="ignore")
    return fxquant.swap_modules(model, graph), x


@pytest.mark.parametrize(("dtype", "lowest_db"), [(torch.float32, 100), (torch.bfloat16, 40)])
@pytest.mark.parametrize("activation", ["float", "int8"])
def test_parts_become_graphs_and_the_rest_stays(dtype, lowest_db, activation):
    model, x = swapped(Gate(), dtype)
    for layer in model.modules():
        if isinstance(layer, fxquant.QuantizedLinearInt4):
            layer.activation = activation
    before = model.state_dict()
    fused = fxquant.fuse_modules(model)
    assert type(fused) is Block
    assert fused.fxquant_fused == {"norm": {"norm": 1}, "gate": {"gate": 1}}
    assert isinstance(fused.gate.gate_up, GatedLinear)
    with torch.no_grad():
        expected, found = model(x, scale=0.5), fused(x, scale=0.5)
    lowest = lowest_db if activation == "float" else 30  # a last bit may round otherwise
    assert fxquant.sqnr_db(expected, found) > lowest
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _branches(part, x):
    return x * 2 if x.sum() > 0 else x


def _remembers(part, x):
    part.last = x
    return x


def _knows_tensors(part, x):
    return x if isinstance(x, torch.Tensor) and x.sum() is not None else x * 2


def _draws(part, x):
    return x + torch.rand(64)


@pytest.mark.parametrize("change", [_branches, _remembers, _draws])
def test_code_that_a_graph_would_lose_stays(change):
    gate = Gate()
    model, x = swapped(gate)
    model.gate.change = change
    fused = fxquant.fuse_modules(model)
    assert fused.fxquant_fused == {"norm": {"norm": 1}}
    assert type(fused.gate) is Gate
    torch.manual_seed(0)
    with torch.no_grad():
        assert fused(x).shape == x.shape


def test_a_part_that_tells_tensors_apart_is_compared():
    model, _ = swapped(Gate())
    model.gate.change = _knows_tensors
    assert fxquant.fuse_modules(model).fxquant_fused == {"norm": {"norm": 1}}


def test_hooks_and_training_keep_a_part():
    model, _ = swapped(Gate())
    model.gate.up.register_forward_hook(lambda *_: None)
    assert fxquant.fuse_modules(model).fxquant_fused == {"norm": {"norm": 1}}
    assert fxquant.fuse_modules(model.train()).fxquant_fused == {}


def test_shared_parts_stay_one_and_memory_may_be_shared():
    model, x = swapped(Gate())
    model.again = model.norm
    fused = fxquant.fuse_modules(model, share_memory=True)
    assert fused.again is fused.norm
    assert fused.norm.weight.data_ptr() == model.norm.weight.data_ptr()
    with torch.no_grad():
        assert fxquant.sqnr_db(model(x), fused(x)) > 100


def test_a_copy_made_for_running_is_not_saved(tmp_path):
    model = models.swapped(models.llama())
    fused = fxquant.fuse_modules(model)
    patterns = {name.rpartition(".")[2]: found for name, found in fused.fxquant_fused.items()}
    norm = {"norm": 1}
    assert patterns == {
        "mlp": {"gate": 1}, "input_layernorm": norm, "post_attention_layernorm": norm, "norm": norm,
    }  # fmt: skip
    with torch.no_grad():
        expected, found = model(**models.IDS).logits, fused(**models.IDS).logits
    assert fxquant.sqnr_db(expected, found) > 100
    with pytest.raises(fxquant.SaveError, match="fused parts"):
        fused.save_pretrained(tmp_path)
    with pytest.raises(fxquant.OptionError, match="fuse_modules"):
        fxquant.fuse_modules("model")
