"""INT4 against torch's float layers and every INT4 peer that is installed.

    OMP_WAIT_POLICY=passive python benchmarks/int4.py --json int4.json
    OMP_WAIT_POLICY=passive python benchmarks/int4.py products --shape 4096x4096 --group 32
    OMP_WAIT_POLICY=passive python benchmarks/int4.py products --bits 2 3 5 6 8 --rows 1 256

Three tables: single products, the overhead of a call, and whole models. All candidates take turns
in one process. For products, several layers of a shape rotate, so that weights come from memory;
below the times, they are divided by others' (below 1 is faster). Peers, where installed:
onnxruntime and onnx, openvino, bitsandbytes.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from int4_models import language_model_rows, minilm_rows
from kernel_peers import installed_peers
from timing import fair_clock, median_seconds, report
from torch import Tensor, nn

import fxquant
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.kernels.choose import BACKENDS
from fxquant.kernels.interface import LinearSpec
from fxquant.numerics.code_books import CODE_BITS, CODE_BOOKS

SHAPES = ("4096x4096", "11008x4096", "384x1536", "768x3072", "256x256")
ROWS = (1, 4, 16, 128)
MEMORY = 140e6  # bytes of weights that take turns: more than caches hold
LAYERS = 128  # at most
CALLS = 1000
TABLES = ("products", "overhead", "models")
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS = {("aten", "float"): "aten", ("native", "float"): "fxquant", ("native", "int8"): "fxquant"}

Run = Callable[[Tensor], Any]


def float_layers(dtype: torch.dtype, weights: list[Tensor]) -> Run:
    """Torch's own product."""
    cast = [weight.to(dtype) for weight in weights]

    def run(x: Tensor) -> None:
        x = x.to(dtype)
        for weight in cast:
            F.linear(x, weight)

    return run


def quantized_layers(name: str, spec: LinearSpec, weights: list[Tensor]) -> Run:
    """A backend of fxquant."""
    backend = BACKENDS[name]
    form: dict[str, Any] = {
        "bits": spec.bits, "group_size": spec.group_size, "code_book": spec.code_book,
    }  # fmt: skip
    packed = [backend.pack(round_to_nearest(weight, **form), spec) for weight in weights]

    def run(x: Tensor) -> None:
        for tensors in packed:
            backend.matmul(x, tensors, spec)

    return run


def candidates(
    shape: tuple[int, int], group_size: int, widths: list[int], books: list[str]
) -> dict[str, tuple[Run, int]]:
    """By name: what runs its layers, and how many they are."""
    runs: dict[str, tuple[Run, int]] = {}

    def add(name: str, bytes_of_weight: float, make: Callable[[list[Tensor]], Run]) -> None:
        elements = shape[0] * shape[1]
        count = max(2, min(LAYERS, round(MEMORY / (elements * bytes_of_weight))))
        weights = [torch.randn(shape) / shape[1] ** 0.5 for _ in range(count)]
        runs[name] = make(weights), count

    for name, dtype in FLOATS.items():
        add(name, dtype.itemsize, lambda weights, dtype=dtype: float_layers(dtype, weights))
    for name, make in installed_peers().items():
        add(name, 0.5, lambda weights, make=make: make(weights, group_size))
    forms = [(bits, None) for bits in widths] + [(CODE_BITS, book) for book in books]
    for (bits, book), (name, activation) in itertools.product(forms, OURS):
        spec = LinearSpec(*shape, group_size, True, activation, bits, book)
        label = f"{OURS[name, activation]} {book or f'W{bits}'}"
        label += "A8" if activation == "int8" else "A16"
        if BACKENDS[name].unsupported(spec, torch.device("cpu")) is None:
            add(label, bits / 8, lambda w, n=name, s=spec: quantized_layers(n, s, w))
    return runs


def milliseconds(
    runs: dict[str, tuple[Run, int]], x: Tensor, rounds: int, statistic: Callable[..., float]
) -> dict[str, float]:
    """Of one layer, by candidate; they take turns."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    clock = fair_clock()
    for number in range(rounds + 2):
        for name, (run, count) in runs.items():
            began = clock()
            run(x)
            if number >= 2:  # the first rounds warm up
                samples[name].append(1e3 * (clock() - began) / count)
    return {name: statistic(values) for name, values in samples.items()}


def ratios(times: dict[str, float]) -> dict[str, float]:
    """Time of the products of fxquant against others."""
    ours = {name: value for name, value in times.items() if name.startswith("fxquant")}
    peers = [times[name] for name in installed_peers() if name in times]
    result = {}
    for name, value in ours.items():
        label = name.removeprefix("fxquant ")
        result |= {f"{label}/{other}": value / times[other] for other in FLOATS}
        if peers:
            result[f"{label}/best peer"] = value / min(peers)
    return result


def product_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds a layer, and ratios, for each shape and number of rows."""
    statistic, books = min if arguments.minimum else statistics.median, arguments.code_book
    table = []
    for text in arguments.shape:
        out_features, in_features = map(int, text.split("x"))
        with torch.inference_mode():
            runs = candidates((out_features, in_features), arguments.group, arguments.bits, books)
            for rows in arguments.rows:
                x = torch.randn(rows, in_features)
                times = milliseconds(runs, x, arguments.rounds, statistic)
                table.append({"shape": text, "M": rows, **times, **ratios(times)})
    return table


def overhead_rows(rounds: int) -> list[dict[str, Any]]:
    """Microseconds a call of the smallest product, 1 x 64 by 64 x 64."""
    linear = nn.Linear(64, 64, bias=False)
    layer = fxquant.QuantizedLinearInt4.from_float(linear, 64)
    backend = BACKENDS[layer.backend]
    spec = LinearSpec(64, 64, 64, True)
    packed = backend.pack(layer.quantized_weight, spec)
    with torch.inference_mode():
        x = torch.randn(1, 64)
        calls: dict[str, Callable[[], Any]] = {
            "F.linear": lambda: F.linear(x, linear.weight),
            "nn.Linear": lambda: linear(x),
            "fxquant product": lambda: backend.matmul(x, packed, spec),
            "fxquant layer": lambda: layer(x),
        }
        seconds = median_seconds(
            {
                name: lambda call=call: [call() for _ in range(CALLS)]
                for name, call in calls.items()
            },
            rounds,
        )
    return [{name: 1e6 * value / CALLS for name, value in seconds.items()}]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="table", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--shape", nargs="*", default=SHAPES, help="out x in, as 4096x4096")
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--bits", nargs="*", type=int, default=[4], help="of fxquant's weights")
    parser.add_argument("--code-book", nargs="*", choices=CODE_BOOKS, default=[])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minimum", action="store_true", help="instead of medians: a busy machine")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    wanted = arguments.tables or TABLES
    if not set(wanted) <= set(TABLES):
        parser.error(f"there is no table {wanted}; there are {', '.join(TABLES)}")

    tables: dict[str, list[dict[str, Any]]] = {}
    if "products" in wanted:
        tables["products"] = table = product_rows(arguments)
        kind = "minimum" if arguments.minimum else "median"
        title = (
            f"ms a layer, group {arguments.group}, {torch.get_num_threads()} threads, "
            f"{kind} of {arguments.rounds} rounds, torch {torch.__version__}"
        )
        report(title, [{k: v for k, v in r.items() if "/" not in k} for r in table], None)
        keys = ("shape", "M")
        against = [{k: v for k, v in r.items() if "/" in k or k in keys} for r in table]
        report("time against others", against, None)
    if "overhead" in wanted:
        tables["overhead"] = overhead_rows(arguments.rounds)
        report("microseconds a call, 1 x 64 by 64 x 64", tables["overhead"], None)
    if "models" in wanted:
        rounds = arguments.rounds
        tables["models"] = language_model_rows(rounds) + minilm_rows(rounds)
        report("a second, whole models", tables["models"], None)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(arguments).items() if k != "json"}
        record = {"torch": torch.__version__, "threads": torch.get_num_threads(), **settings}
        arguments.json.write_text(json.dumps({**record, "tables": tables}, indent=2) + "\n")


if __name__ == "__main__":
    main()
