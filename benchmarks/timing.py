"""Fair timing: candidates take turns, the median counts."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate


def fair_clock() -> Callable[[], float]:
    """On one thread, the time of the processor, which other jobs of the machine disturb less."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def median_seconds(
    runs: dict[str, Callable[[], Any]],
    rounds: int = 15,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each run by `clock` (see `fair_clock`); every run has a turn each round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + warm_up):
        for name, run in runs.items():
            began = clock()
            run()
            if number >= warm_up:
                seconds[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Print rows as a table and, with a path, write them as JSON."""
    print(f"\n{title}\n{tabulate(rows, headers='keys', floatfmt='.3f')}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"title": title, "rows": rows}, indent=2) + "\n")
