"""Prints what a plan predicts and what the run takes, in a process of its own: a peak is one's."""

import gc
import json
import sys
from pathlib import Path

import torch
from torch import nn

import fxquant
from fxquant.passes.freed_memory import give_back_freed
from fxquant.passes.held_values import HeldValues

OPTIONS = {"method": "gptq", "accuracy_warning": "ignore", "num_calibration_samples": 10**6}
MEMORY = "8MB"


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(field)


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def batches(width: int, count: int, rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, width, generator=generator) for _ in range(count)]


def main() -> None:
    files = []
    close = HeldValues.close
    HeldValues.close = lambda held: (files.append(held.file_bytes), close(held))
    fxquant.quantize(network(128), batches(128, 4, 8), **OPTIONS)  # imports are paid for
    model, data = network(640), batches(640, 24, 256)
    forecast = fxquant.plan(model, data=data, memory=MEMORY, **OPTIONS).forecast
    gc.collect()
    give_back_freed()  # what was freed, but is kept, would hide a part of what the run takes
    before = status_bytes("VmRSS")
    _, info = fxquant.quantize(model, data, memory=MEMORY, **OPTIONS)
    found = {
        "memory": (forecast.memory_bytes, status_bytes("VmHWM") - before),
        "disk": (forecast.spilled_bytes, files[-1]),
        "output": (forecast.output_bytes, info.quantized_size_mb * 1e6),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
