"""Other libraries on the work of `scale.py`: the same model, the same batches, INT4.

    pip install llmcompressor auto-round

Whichever is installed takes part. Both quantize the linear layers of the blocks, and read a
tokenizer that they do not use here, since the data are tokens already. Groups are of 128 columns;
llm-compressor, which needs whole groups, has smaller ones where a width is no multiple of 128.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

Batches = list[dict[str, Tensor]]
PACKAGES = {"llm-compressor": "llmcompressor", "auto-round": "auto_round"}


def installed() -> list[str]:
    """The names of the libraries that are there."""
    return [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]


def prepared(name: str, model: Any, folder: Path) -> Callable[[Batches], nn.Module]:
    """What makes a quantized model of batches; the library is imported and the model named.

    Args:
        name: of a library.
        model: of transformers; it is changed.
        folder: where its config and tokenizer are put, which llm-compressor reads.
    """
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?")
    for saved in (model.config, tokenizer):
        saved.save_pretrained(folder)
    model.name_or_path = model.config._name_or_path = str(folder)
    make = {"llm-compressor": _llm_compressor, "auto-round": _auto_round}[name]
    return make(model, tokenizer)


def _llm_compressor(model: Any, tokenizer: Any) -> Callable[[Batches], nn.Module]:
    """GPTQ, block by block, each on what the quantized blocks before it give."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    widths = {m.in_features for m in model.modules() if isinstance(m, nn.Linear)}
    group = next(size for size in (128, 64, 32) if not any(width % size for width in widths))
    weights = QuantizationArgs(num_bits=4, group_size=group, strategy="group")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)

    def make(batches: Batches) -> nn.Module:
        rows = torch.cat([batch["input_ids"] for batch in batches])
        columns = {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=Dataset.from_dict(columns).with_format("torch"),
            recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
            max_seq_length=rows.shape[1],
            num_calibration_samples=len(rows),
        )
        return model

    return make


def _auto_round(model: Any, tokenizer: Any) -> Callable[[Batches], nn.Module]:
    """Its light recipe: 50 steps of signed gradients for each block, not 200."""
    from auto_round import AutoRound

    def make(batches: Batches) -> nn.Module:
        rounding: Any = AutoRound(
            model,
            tokenizer,
            scheme="W4A16",
            dataset=[dict(batch) for batch in batches],
            nsamples=sum(len(batch["input_ids"]) for batch in batches),
            seqlen=batches[0]["input_ids"].shape[1],
            iters=50,
            lr=5e-3,
            device_map="cpu",
            enable_torch_compile=False,
        )
        return rounding.quantize()[0]

    return make
