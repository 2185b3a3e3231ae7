"""Quantized models in the hands of torch.jit and transformers."""

import pytest
import torch
from torch import nn

import fxquant

QUIET = {"accuracy_warning": "ignore"}


@pytest.mark.filterwarnings("ignore")  # torch deprecates it, and warns of each check of a shape
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_graph_can_be_traced_by_torchscript(bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    graph, _ = fxquant.static_quantize(model, [torch.randn(8, 64)], bits=bits, **QUIET)
    x = torch.randn(5, 64)
    assert torch.equal(torch.jit.trace(graph, torch.randn(8, 64))(x), graph(x))


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=256, intermediate_size=512, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_a_language_model_without_example_inputs_is_quantized():
    model = llama()
    with pytest.warns(UserWarning, match="not verified against the model"):
        graph, info = fxquant.quantize(model)
    assert len(info.selected_layers) == 7
    swapped = fxquant.swap_modules(model, graph)
    tokens = torch.randint(5, 200, (2, 9))
    expected, found = model(input_ids=tokens).logits, swapped(input_ids=tokens).logits
    noise = (expected - found).square().mean() / expected.square().mean()
    assert 0 < noise < 0.1


def test_a_swapped_model_saves_what_reads_back_or_nothing(tmp_path):
    model = llama()
    tokens = torch.randint(5, 200, (2, 9))
    graph, _ = fxquant.quantize(model, example_inputs={"input_ids": tokens}, **QUIET)
    swapped = fxquant.swap_modules(model, graph)
    folder = tmp_path / "saved"
    try:
        swapped.save_pretrained(folder)
    except fxquant.FxquantError:
        assert not folder.exists() or not list(folder.glob("*.safetensors"))
        return
    loaded = type(model).from_pretrained(folder).eval()
    expected, found = swapped(input_ids=tokens).logits, loaded(input_ids=tokens).logits
    assert torch.equal(expected, found)
