"""Our GGUF files run by llama.cpp, against our graph and the tokens that it generates."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxquant
from tests.examples import example
from tests.exporters.layers import quantized_layers

script = example("run_in_llama_cpp")
EQUAL_DB = 110  # the same float32 weights; products and norms are llama.cpp's own
LEAST_DB = 35  # llama.cpp rounds each 32 activations to 8 bits, which alone costs about 40 dB
PROMPT = "nce of the\npassover: There shall"
LENGTH = 64


def grouped():
    """Random weights, and two heads of queries for one of keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), torch.randint(64, (LENGTH,))


def embedded():
    """The trained model of the package, and text that it has not seen."""
    return script.embedded_llama(), script.demo.heldout_tokens()[0][:LENGTH]


MODELS = {"grouped": grouped, "embedded": embedded}


@torch.no_grad()
def logits(model, tokens):
    found = model(input_ids=tokens[None])
    return found["logits"][0]


def with_weights_of(model, graph):
    """The float model with the weights that the quantized layers stand for."""
    for name, layer in quantized_layers(graph).items():
        model.get_submodule(name).weight.data = layer.dequantize()
    return model


@pytest.mark.parametrize(
    ("name", "bits"),
    [("embedded", 4), ("grouped", 8), ("grouped", {"*.down_proj": 8, "*.v_proj": 8, "*": 4})],
    ids=str,
)
def test_llama_cpp_computes_what_the_graph_does(name, bits, tmp_path):
    model, tokens = MODELS[name]()
    graph, _ = fxquant.quantize(
        model, example_inputs={"input_ids": tokens[None]}, bits=bits, target="gguf",
        accuracy_warning="ignore", modules_to_not_convert=["lm_head"],
    )  # fmt: skip
    base, path = tmp_path / "float.gguf", tmp_path / "new.gguf"
    script.write_gguf(model, base)
    before, expected = logits(model, tokens), logits(graph, tokens)
    assert fxquant.sqnr_db(before, script.LlamaCpp(base).logits(tokens)) > EQUAL_DB
    fxquant.export(graph, path, format="gguf", base=base)
    found = script.LlamaCpp(path).logits(tokens)
    assert fxquant.sqnr_db(expected, found) > LEAST_DB
    script.write_gguf(with_weights_of(model, graph), base)
    assert fxquant.sqnr_db(expected, script.LlamaCpp(base).logits(tokens)) > EQUAL_DB


def test_it_generates_the_tokens_that_the_swapped_model_does(tmp_path):
    model, _ = embedded()
    ids = torch.tensor([list(PROMPT.encode())])
    graph, _ = fxquant.quantize(
        model, example_inputs={"input_ids": ids}, target="gguf", accuracy_warning="ignore"
    )
    script.write_gguf(model, tmp_path / "float.gguf")
    fxquant.export(graph, tmp_path / "new.gguf", format="gguf", base=tmp_path / "float.gguf")
    swapped = fxquant.swap_modules(model, graph)
    expected = swapped.generate(ids, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
    found = script.LlamaCpp(tmp_path / "new.gguf").generate(PROMPT, LENGTH)
    assert found == bytes(expected[0, ids.shape[1] :].tolist())
