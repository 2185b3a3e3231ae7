"""Fair timing: candidates take turns, the median counts."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate


def median_seconds(
    runs: dict[str, Callable[[], Any]],
    rounds: int = 15,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each run; in each round every run has its turn.

    On a busy machine, runs on one thread are fairer by `clock=time.process_time`.
    """
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
