"""The two models that accuracy is measured on, with their texts; see `sources.py`.

Calibration is text of one book. Each figure is measured on other parts of that book, on every other
source alone, and of those the worst and the mean are printed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sources import (
    MEASURED_LANGUAGES,
    Source,
    book_for_calibration,
    book_held_out,
    built_in_text,
    other_sources,
)
from torch import Tensor, nn

import fxquant
from fxquant.config.quant_config import QuantConfig
from fxquant.demo.language_model import load_language_model
from fxquant.passes.decide import decide
from fxquant.passes.rewrite import rewrite

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
WINDOWS, SENTENCES = 128, 384  # of the book for calibration, at most
PASSAGES = len(fxquant.calibration_text())  # of the text that fxquant ships
SAME = "same book"


@dataclass(frozen=True)
class Subject:
    """A model with its texts.

    Attributes:
        model: float.
        graph: the same, traced.
        calibration: batches of the book.
        built_in: batches of the text that fxquant ships: as many passages as it gives by default,
            or as many windows as of the book.
        other_languages: the same without the languages that are measured on.
        samples: how many rows of them are used.
        figure: its name.
        measure: that figure of a quantized model by source, `SAME` first.
        batches: of a source, at most so many pieces or windows of it.
        keep: names that stay float.
    """

    model: nn.Module
    graph: torch.fx.GraphModule
    calibration: list[Any]
    built_in: list[Any]
    other_languages: list[Any]
    samples: int
    figure: str
    measure: Callable[[nn.Module], dict[str, float]]
    batches: Callable[[Source, int], list[Any]]
    keep: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many tokens of the book calibration takes."""
        return token_count(self.calibration)

    @property
    def quantized(self) -> list[str]:
        """Names of the layers that become INT4."""
        decisions = decide(self.graph, QuantConfig(modules_to_not_convert=self.keep))
        return [d.module for d in decisions if d.bits]

    def row(self, model: nn.Module) -> dict[str, float]:
        """What the table says of a quantized model."""
        found = self.measure(model)
        others = [figure for name, figure in found.items() if name != SAME]
        summary = {SAME: found[SAME], "worst": min(others), "mean": sum(others) / len(others)}
        return summary | found


def plain_rounding(graph: torch.fx.GraphModule, keep: Sequence[str] = ()) -> nn.Module:
    """Rounding to nearest over the full range, symmetric; the layers `keep` stay float."""
    decisions = decide(graph, QuantConfig(modules_to_not_convert=keep))
    return rewrite(
        graph, decisions, lambda _, linear, __: fxquant.QuantizedLinearInt4.from_float(linear)
    )


def token_count(batches: list[Any]) -> int:
    """The tokens of some batches that are no padding."""
    masks = [b["attention_mask"] if isinstance(b, dict) else torch.ones_like(b) for b in batches]
    return sum(int(mask.sum()) for mask in masks)


def built_in_batches(
    batches: Callable[[Source, int], list[Any]], passages: int | None, pieces: int
) -> tuple[list[Any], list[Any]]:
    """Those of the text that fxquant ships, and of that without the languages measured on.

    Args:
        batches: of a source, at most so many pieces or windows of it.
        passages: how many of the text are taken; None for all.
        pieces: of these passages.
    """
    first = batches(built_in_text(passages), pieces)
    return first, batches(built_in_text(passages, without=MEASURED_LANGUAGES), pieces)


def language_model(pieces: int) -> Subject:
    """The embedded one: how much less its predictions diverge than with plain rounding.

    The divergence is the mean of KL(float ‖ quantized) over next bytes. Unlike the gap between
    perplexities it is a distance on text that the float model predicts badly, too: there, rounding
    may happen to raise a probability as well as lower it.

    Args:
        pieces: of each other source to measure on, at most; a window has more tokens than a
            sentence, so half as many windows are taken.
    """

    def batches(source: Source, count: int) -> list[Tensor]:
        return list(source.windows(count).split(16))

    model = load_language_model()
    calibration = batches(book_for_calibration(), WINDOWS)
    graph = fxquant.trace(model, calibration[0][:2])
    texts = {SAME: book_held_out().windows(pieces)}
    texts |= {source.name: source.windows(pieces // 2) for source in other_sources()}
    expected = {name: _log_probabilities(graph, windows) for name, windows in texts.items()}

    def divergences(quantized: nn.Module) -> dict[str, float]:
        return {
            name: F.kl_div(
                _log_probabilities(quantized, windows), expected[name],
                log_target=True, reduction="batchmean",
            ).item()
            for name, windows in texts.items()
        }  # fmt: skip

    plain = divergences(plain_rounding(graph))

    def measure(quantized: nn.Module) -> dict[str, float]:
        return {name: 1 - found / plain[name] for name, found in divergences(quantized).items()}

    figure = "gap closed (1 - divergence / that of plain rounding)"
    built_in, others = built_in_batches(batches, None, WINDOWS)
    return Subject(model, graph, calibration, built_in, others, WINDOWS, figure, measure, batches)


@torch.inference_mode()
def _log_probabilities(model: nn.Module, windows: Tensor) -> Tensor:
    """Of each next byte, [tokens, vocabulary]."""
    parts = [model(batch).float().log_softmax(-1).flatten(0, 1) for batch in windows.split(32)]
    return torch.cat(parts)


def minilm(pieces: int) -> Subject:
    """A sentence encoder: the SQNR in dB of its mean-pooled embedding.

    Args:
        pieces: of each other source to measure on, at most.
    """
    import minilm
    from transformers import AutoModel

    folder = minilm.model_folder()

    def batches(source: Source, count: int) -> list[Any]:
        return minilm.batches(source.pieces(count), folder)

    model = AutoModel.from_pretrained(folder).eval()
    calibration = batches(book_for_calibration(), SENTENCES)
    texts = {SAME: batches(book_held_out(), 2 * pieces)}
    texts |= {source.name: batches(source, pieces) for source in other_sources()}
    expected = {name: minilm.embeddings(model, batches) for name, batches in texts.items()}

    def measure(quantized: nn.Module) -> dict[str, float]:
        return {
            name: fxquant.sqnr_db(expected[name], minilm.embeddings(quantized, batches))
            for name, batches in texts.items()
        }

    graph = fxquant.trace(model, calibration[0])
    samples = sum(len(batch["input_ids"]) for batch in calibration)
    built_in, others = built_in_batches(batches, PASSAGES, PASSAGES)
    return Subject(
        model, graph, calibration, built_in, others, samples, "dB", measure, batches, ["pooler"]
    )


SUBJECTS = {"language model": language_model, "minilm": minilm}


def subject_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks of these models have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--pieces", type=int, default=128, help="of each source to measure on")
    parser.add_argument("--json", type=Path)
    return parser
