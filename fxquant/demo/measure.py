"""Figures of a language model: perplexity and tokens per second."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH = 32


@torch.inference_mode()
def perplexity(model: Callable[[Tensor], Tensor], tokens: Tensor) -> float:
    """Exp of the mean cross-entropy of each next token.

    Args:
        model: maps tokens [batch, length] to logits [batch, length, vocabulary].
        tokens: [samples, length].
    """
    total = 0.0
    for batch in tokens.split(BATCH):
        logits = model(batch)[:, :-1].float().flatten(0, 1)
        total += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1)))


def tokens_per_second(
    runs: dict[str, Callable[[], Any]], tokens: int, rounds: int = 5
) -> dict[str, float]:
    """Median tokens per second of each run; the runs take turns, so that noise hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: tokens / sorted(times)[rounds // 2] for name, times in seconds.items()}
