"""What quantizing costs: time in copies of the weights, and peak memory.

OMP_WAIT_POLICY=passive python benchmarks/quantizing.py
"""

import argparse
import resource
from pathlib import Path

import torch
from timing import median_seconds, report
from torch import nn

import fxquant
from fxquant.algorithms.rtn import round_to_nearest

WIDTH = 4096
LAYERS = 4


def peak_bytes() -> int:
    """The most memory this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    model_bytes = sum(p.numel() * 4 for p in model.parameters())
    # Imports and code paths are paid for once, by a small model.
    fxquant.quantize(nn.Sequential(nn.Linear(256, 256)), accuracy_warning="ignore")
    before = peak_bytes()
    fxquant.quantize(model, accuracy_warning="ignore")
    memory = [
        {
            "model": f"{LAYERS} x {WIDTH} x {WIDTH} float32",
            "model MB": model_bytes / 1e6,
            "peak over model MB": (peak_bytes() - before) / 1e6,
            "in layers": (peak_bytes() - before) / (model_bytes / LAYERS),
        }
    ]
    report("peak memory of quantize (resident set)", memory, None)

    weight = torch.randn(WIDTH, WIDTH)
    target = torch.empty_like(weight)
    seconds = median_seconds(
        {
            "copy": lambda: target.copy_(weight),
            "plain rounding": lambda: fxquant.quantize_weight_int4(weight),
            "rtn symmetric": lambda: round_to_nearest(weight),
            "rtn asymmetric": lambda: round_to_nearest(weight, symmetric=False),
        },
        rounds=5,
        warm_up=1,
    )
    rows = [
        {"what": name, "ms": 1e3 * value, "copies": value / seconds["copy"]}
        for name, value in seconds.items()
    ]
    report(f"time to quantize one {WIDTH} x {WIDTH} float32 weight", rows, arguments.json)


if __name__ == "__main__":
    main()
