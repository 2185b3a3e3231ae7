"""The example for lm-evaluation-harness: its figures are those of the model's own outputs."""

import math

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import fxquant
from tests.examples import example

TEXTS = ["A first text, of some words.", "A second one."]


@torch.no_grad()
def bits_per_byte(model, tokenizer):
    """Of the texts, each behind the token that ends one."""
    bits = 0.0
    for text in TEXTS:
        own = tokenizer(text, add_special_tokens=False).input_ids
        ids = torch.tensor([[tokenizer.eos_token_id, *own]])
        logits = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
        bits -= float(logits[0].gather(1, ids[0, 1:, None]).sum()) / math.log(2)
    return bits / sum(len(text.encode()) for text in TEXTS)


@pytest.mark.filterwarnings("ignore")  # of the harness
def test_the_harness_takes_a_swapped_model_as_it_is():
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=256, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    swapped, _ = fxquant.quantize(
        model, example_inputs={"input_ids": torch.zeros(1, 8).long()}, bits=2, into="model",
        accuracy_warning="ignore",
    )  # fmt: skip
    evaluate = example("evaluate_language_model").evaluate
    found = evaluate(swapped, tokenizer, TEXTS)["bits_per_byte"]
    assert found == pytest.approx(bits_per_byte(swapped, tokenizer), rel=1e-6)
    assert found != pytest.approx(bits_per_byte(model, tokenizer), rel=1e-6)
