"""lm-evaluation-harness on a quantized language model, offline: the harness takes it as it is.

    pip install lm_eval
    python examples/evaluate_language_model.py [folder] [--bits 4] [--texts texts.jsonl]

`folder` is a causal model of transformers with its tokenizer. Without one, a small Llama is trained
on the bytes of half of the text that fxquant has. The task is the perplexity of texts that
calibration did not see: lines {"text": ...} of `--texts`, or the other half. Tasks that the harness
knows are used in the same way, by name, where it can download their data.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import fxquant

LENGTH = 128  # tokens of a sample
BATCH = 16
TASK = "perplexity_of_texts"
METRICS = ("byte_perplexity", "bits_per_byte")


def samples(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The texts one behind the other, as tokens [samples, LENGTH]."""
    ids = tokenizer("\n".join(texts), add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def trained(texts: list[str], tokenizer: PreTrainedTokenizerBase, steps: int) -> PreTrainedModel:
    """A small Llama that has seen the texts some times."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=2 * LENGTH, eos_token_id=1,
    )  # fmt: skip
    model, tokens = LlamaForCausalLM(config), samples(texts, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        batch = tokens[torch.randint(len(tokens), (BATCH,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> dict[str, float]:
    """What the harness finds for a model, float or with quantized layers.

    Returns:
        The perplexity of a byte, and bits a byte.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        task: dict[str, Any] = {
            "task": TASK, "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": folder},
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in METRICS],
        }  # fmt: skip
        harness = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=BATCH, max_length=LENGTH,
            add_bos_token=False,  # nor a token that ends a text: samples have none
        )  # fmt: skip
        found = simple_evaluate(harness, tasks=[task], bootstrap_iters=0)
    return {name: found["results"][TASK][f"{name},none"] for name in METRICS}


def main() -> None:
    """Evaluate the float model and the quantized one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()

    known = fxquant.calibration_text(256)
    seen, heldout = known[::2], known[1::2]
    if arguments.texts is not None:
        lines = arguments.texts.read_text().splitlines()
        heldout = [json.loads(line)["text"] for line in lines]
    if arguments.folder is None:
        tokenizer: PreTrainedTokenizerBase = ByT5Tokenizer()
        model = trained(seen, tokenizer, arguments.steps)
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
        model = AutoModelForCausalLM.from_pretrained(arguments.folder).eval()
    batches = [{"input_ids": batch} for batch in samples(seen, tokenizer).split(BATCH)]
    quantized, info = fxquant.quantize(
        model, batches, bits=arguments.bits, method=arguments.method, into="model"
    )
    print(f"output SQNR {info.sqnr_db:.1f} dB")
    rows = {
        "float": evaluate(model, tokenizer, heldout),
        f"{arguments.bits} bits, {arguments.method}": evaluate(quantized, tokenizer, heldout),
    }
    for name, figures in rows.items():
        print(f"{name:16}", *(f"{key} {value:.4f}" for key, value in figures.items()), sep="  ")


if __name__ == "__main__":
    main()
