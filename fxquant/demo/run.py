"""`fxquant demo`: the main job on the embedded model, with every figure it claims."""

import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch

from fxquant.demo.language_model import (
    calibration_tokens,
    heldout_tokens,
    load_language_model,
)
from fxquant.demo.measure import perplexity, tokens_per_second
from fxquant.pipeline import static_quantize
from fxquant.serialization.files import load_model, save_model
from fxquant.swap import swap_modules
from fxquant.tracing.trace import trace
from fxquant.tracing.trace_report import trace_report

CALIBRATION_SAMPLES = 64  # calibration
CALIBRATION_STRIDE = 6  # of the windows shipped: a sample of each of the three texts
EVALUATION_STRIDE = 4
GENERATED = 48
PROMPT = b"In the beginning "


class Writer(Protocol):
    """Where the demo writes for people."""

    def text(self, line: object = "") -> None:
        """A line."""

    def title(self, line: str) -> None:
        """A heading."""


def run_demo(out: Writer, output: Path | None = None) -> dict[str, Any]:
    """Quantize the embedded model, print the story to `out` and return its figures.

    Args:
        out: where to print.
        output: where to save the model; by default a temporary file that is removed again.
    """
    model = load_language_model()
    gm = trace(model, calibration_tokens()[:2])
    out.title("The model: a byte-level language model trained on public-domain text")
    out.text(trace_report(gm))

    qmodel, info = static_quantize(
        gm,
        calibration_tokens()[::CALIBRATION_STRIDE].split(16),
        num_calibration_samples=CALIBRATION_SAMPLES,
        accuracy_warning="ignore",
    )
    out.title("The decisions: what was decided for each layer, and what it cost")
    out.text(info.table())
    for warning in info.warnings:
        out.text(f"warning: {warning}")

    figures: dict[str, Any] = {"info": info.to_dict()}
    heldout = heldout_tokens()[::EVALUATION_STRIDE]
    figures["perplexity_float"] = perplexity(gm, heldout)
    figures["perplexity_int4"] = perplexity(qmodel, heldout)
    figures["bytes_float"] = round(info.original_size_mb * 1e6)
    figures["bytes_int4"] = round(info.quantized_size_mb * 1e6)
    out.title("Accuracy and size")
    out.text(f"output SQNR on rows held out         {info.sqnr_db:.2f} dB")
    out.text(f"perplexity on held-out text, float   {figures['perplexity_float']:.4f}")
    out.text(f"perplexity on held-out text, INT4    {figures['perplexity_int4']:.4f}")
    out.text(f"bytes, float32                       {figures['bytes_float']:,}")
    out.text(f"bytes, INT4                          {figures['bytes_int4']:,}")
    out.text(f"                                     {info.compression_ratio:.2f} times smaller")

    generator = swap_modules(model, qmodel)
    prompt = torch.tensor([list(PROMPT)])
    text = heldout[:8]
    with torch.inference_mode():
        reading = tokens_per_second(
            {"float": lambda: gm(text), "int4": lambda: qmodel(text)}, text.numel()
        )
        writing = tokens_per_second(
            {
                "float": lambda: model.generate(prompt, GENERATED),
                "int4": lambda: generator.generate(prompt, GENERATED),
            },
            GENERATED,
        )
        written = bytes(generator.generate(prompt, GENERATED)[0].tolist()).decode("latin-1")
    figures["tokens_per_second_reading"] = reading
    figures["tokens_per_second_writing"] = writing
    out.title("Speed, on this machine")
    out.text(f"reading, 8 x 256 bytes at once   float32 {reading['float']:,.0f} tokens/s, "
             f"INT4 {reading['int4']:,.0f} tokens/s")  # fmt: skip
    out.text(f"writing, one byte at a time      float32 {writing['float']:,.0f} tokens/s, "
             f"INT4 {writing['int4']:,.0f} tokens/s")  # fmt: skip
    out.text(f"the quantized model writes: {written!r}")

    out.title("The saved file")
    with tempfile.TemporaryDirectory() as folder:
        path = output or Path(folder) / "language_model_int4.safetensors"
        save_model(qmodel, path, info)
        reloaded = load_model(path)
        figures["file_bytes"] = path.stat().st_size
        with torch.inference_mode():
            figures["reload_is_identical"] = torch.equal(reloaded(text), qmodel(text))
    kept = str(path) if output is not None else "a temporary file (keep it with --output)"
    out.text(f"{kept}: {figures['file_bytes']:,} bytes")
    out.text(f"the reloaded graph's outputs are bit-identical: {figures['reload_is_identical']}")
    return figures
