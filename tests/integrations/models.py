"""Small models of transformers with random weights, and what a call of them takes."""

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import fxquant
from fxquant.modules.layer import QuantizedLayer

VOCABULARY = 64
IDS = {"input_ids": torch.randint(0, VOCABULARY, (2, 16))}
QUIET = {"accuracy_warning": "ignore"}
_SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip


def llama(tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        **_SIZES, num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2
    )
    return LlamaForCausalLM(config).eval()


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**_SIZES)).eval()


def t5() -> PreTrainedModel:
    torch.manual_seed(0)
    config = T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=1, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(**_SIZES, num_key_value_heads=2, num_local_experts=4)
    ).eval()


MODELS = {
    "llama": llama, "tied": lambda: llama(tied=True), "bert": bert, "t5": t5, "gpt2": gpt2,
    "mixtral": mixtral,
}  # fmt: skip


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    more = {"decoder_input_ids": IDS["input_ids"][:, :5]} if model.config.is_encoder_decoder else {}
    return {**IDS, **more}


def swapped(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    made, _ = fxquant.quantize(
        model, example_inputs=inputs(model), into="model", **{"group_size": 32, **QUIET, **options}
    )
    return made


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(**inputs(model)).logits


def layers(model: torch.nn.Module) -> dict[str, QuantizedLayer]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    return {n: m for n, m in found.items() if n.rpartition(".")[0] not in found}
