"""INT4 and INT8 Linear layers against float32 and bfloat16 ones.

    OMP_WAIT_POLICY=passive python benchmarks/linear.py

Several layers of one shape take turns, so that weights come from memory, not from a cache. Columns
are milliseconds a layer; ratios are time against torch (below 1 is faster).
"""

import argparse
from pathlib import Path

import torch
from timing import median_seconds, report
from torch import nn

from fxquant import QuantizedLinearInt4, QuantizedLinearInt8

SHAPES = ((4096, 4096), (384, 1536), (256, 256))
ROWS = (1, 4, 16, 128)
MEMORY = 256e6  # bytes of float32 weights in rotation


def measure(out_features: int, in_features: int) -> list[dict[str, object]]:
    """One row for each number of rows M."""
    count = max(2, min(64, int(MEMORY / (4 * out_features * in_features))))
    floats = [nn.Linear(in_features, out_features, bias=False) for _ in range(count)]
    layers = {
        "float32": floats,
        "bfloat16": [
            nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16) for _ in floats
        ],
        "int4": [QuantizedLinearInt4.from_float(layer) for layer in floats],
        "int8": [QuantizedLinearInt8.from_float(layer) for layer in floats],
    }
    rows = []
    for m in ROWS:
        x = torch.randn(m, in_features)
        inputs = {"float32": x, "bfloat16": x.bfloat16(), "int4": x, "int8": x}
        runs = {
            name: lambda these=layers[name], value=inputs[name]: [f(value) for f in these]
            for name in layers
        }
        with torch.inference_mode():
            seconds = median_seconds(runs)
        times = {name: 1e3 * value / count for name, value in seconds.items()}
        row: dict[str, object] = {"out": out_features, "in": in_features, "M": m, **times}
        row["int4/float32"] = times["int4"] / times["float32"]
        row["int4/bfloat16"] = times["int4"] / times["bfloat16"]
        rows.append(row)
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [row for shape in SHAPES for row in measure(*shape)]
    title = f"ms a layer, group 128, {torch.get_num_threads()} threads, torch {torch.__version__}"
    report(title, rows, arguments.json)


if __name__ == "__main__":
    main()
