"""What loading a file of 1 GB costs beside reading it: CPU time and wall time, best of a few."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fxquant

PIECE = 1 << 20


def read(path: Path) -> torch.Tensor:
    """The bytes of a file in new memory, and nothing else."""
    data = torch.empty(path.stat().st_size, dtype=torch.uint8)
    view = data.numpy().data
    with path.open("rb", buffering=0) as file:
        for start in range(0, len(view), PIECE):
            file.readinto(view[start : start + PIECE])
    return data


def best(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    """The least CPU time and the least wall time of a call, in seconds."""
    times = []
    for _ in range(rounds):
        start = time.process_time(), time.perf_counter()
        made = call()
        times.append((time.process_time() - start[0], time.perf_counter() - start[1]))
        del made
    return min(t[0] for t in times), min(t[1] for t in times)


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=15, help="of 67 MB each")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = nn.Sequential(*[nn.Linear(4096, 4096) for _ in range(options.layers)]).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        fxquant.save_model(fxquant.trace(model), path)
        del model
        fxquant.load_model(path)  # imports, and the file in the page cache
        reading = best(lambda: read(path), options.rounds)
        loading = best(lambda: fxquant.load_model(path), options.rounds)
        print(f"{path.stat().st_size / 1e9:.2f} GB")
        for name, one, other in zip(("CPU", "wall"), reading, loading, strict=True):
            print(f"{name}: read {one:.2f} s, load {other:.2f} s, ratio {other / one:.2f}")


if __name__ == "__main__":
    main()
