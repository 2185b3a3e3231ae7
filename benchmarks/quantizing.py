"""What quantizing costs: time beside a memcpy of the weights, peak memory, growth with layers.

    OMP_WAIT_POLICY=passive python benchmarks/quantizing.py
    OMP_WAIT_POLICY=passive python benchmarks/quantizing.py rounding calibration

Tables: `stack`, `rounding`, `calibration`, `gptq`, `wide`, `stages`. Where llm-compressor is
installed, `gptq` runs it too.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from quantizer_peers import gptq_peers, rounding_peers
from timing import median_seconds, report
from torch import Tensor, nn

import fxquant
from fxquant.algorithms.gptq import gptq
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.demo.language_model import calibration_tokens, load_language_model
from fxquant.kernels import rounding as cpp
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.numerics.grouping import expand_groups
from fxquant.numerics.quantized_weight import QuantizedWeight
from fxquant.observers.moments import LayerMoments, damped

WIDTH = 4096
LAYERS = 60  # 1.0 billion parameters
Rows = list[dict[str, Any]]


def peak_bytes() -> int:
    """The most memory this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stack() -> Rows:
    """A stack of a billion parameters. Comes first: the peak is the process's."""
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    layer_bytes = WIDTH * WIDTH * 4
    copied = torch.empty(WIDTH, WIDTH)
    # Imports and code paths are paid for once, by a small model.
    fxquant.quantize(nn.Sequential(nn.Linear(256, 256)), accuracy_warning="ignore")
    copy_seconds = median_seconds({"copy": lambda: copied.copy_(model[0].weight.detach())})["copy"]
    before, began = peak_bytes(), time.perf_counter()
    _, info = fxquant.quantize(model, accuracy_warning="ignore")
    seconds = time.perf_counter() - began
    return [
        {
            "model": f"{LAYERS} x {WIDTH} x {WIDTH} float32",
            "s": seconds,
            "time / memcpy of the weights": seconds / (LAYERS * copy_seconds),
            "peak over model, in layers": (peak_bytes() - before) / layer_bytes,
            "result, in layers": info.quantized_size_mb * 1e6 / layer_bytes,
        }
    ]


def in_torch(weight: Tensor) -> QuantizedWeight:
    """As where the extension was not built."""
    with mock.patch.object(cpp, "FAULT", "left out"):
        return round_to_nearest(weight)


def rounding() -> Rows:
    """One weight, by fxquant and by each library that is installed."""
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    weight = layer.weight.detach()
    target = torch.empty_like(weight)
    runs: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(weight),
        "plain rounding": lambda: fxquant.quantize_weight_int4(weight),
        "rtn symmetric": lambda: round_to_nearest(weight),
        "rtn asymmetric": lambda: round_to_nearest(weight, symmetric=False),
        "rtn symmetric, without C++": lambda: in_torch(weight),
        "rtn symmetric, a layer": lambda: QuantizedLinearInt4(round_to_nearest(weight), None),
    }
    for name, quantize in rounding_peers().items():
        runs[name] = lambda quantize=quantize: quantize(layer)
    seconds = median_seconds(runs, rounds=5, warm_up=1)
    return [
        {"what": name, "ms": 1e3 * value, "time / memcpy of the weight": value / seconds["copy"]}
        for name, value in seconds.items()
    ]


def calibration() -> Rows:
    """Against plain forwards of the traced graph."""
    batches = list(calibration_tokens()[:64].split(16))
    gm = fxquant.trace(load_language_model(), batches[0])
    observed = {
        n: fxquant.insert_observers(gm, n) for n in ("minmax", "movingaverage", "histogram")
    }

    @torch.no_grad()
    def forwards() -> None:
        for batch in batches:
            gm(batch)

    runs: dict[str, Callable[[], Any]] = {"forward": forwards}
    for name, graph in observed.items():
        runs[name] = lambda graph=graph: fxquant.calibrate(graph, batches, progress=False)
    seconds = median_seconds(runs, rounds=7, warm_up=1)
    return [
        {"embedded language model": name, "s": value, "of a forward": value / seconds["forward"]}
        for name, value in seconds.items()
    ]


def unblocked(weight: Tensor, moments: LayerMoments) -> Tensor:
    """GPTQ's column loop as it is written down: each column updates all that follow."""
    columns = weight.shape[1]
    grid = round_to_nearest(weight, importance=moments.importance)
    scales, zeros = (expand_groups(t, 128, columns) for t in (grid.scales, grid.zero_points))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moments.hessian, 0.05)))
    factor, rest = torch.linalg.cholesky(inverse, upper=True), weight.clone()
    quantized = torch.empty_like(rest)
    for i in range(columns):
        column = rest[:, i]
        q = (column / scales[:, i] + zeros[:, i]).round().clamp(0, 15)
        quantized[:, i] = scales[:, i] * (q - zeros[:, i])
        error = (column - quantized[:, i]) / factor[i, i]
        rest[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    return quantized


def gptq_layer() -> Rows:
    """One layer: time and squared error of its output. The loop takes minutes, so all run once."""
    weight, moments = torch.randn(WIDTH, WIDTH), LayerMoments(WIDTH, 1)
    shared = torch.randn(64, WIDTH)  # inputs of real layers are far from independent
    moments.add(torch.randn(2 * WIDTH, WIDTH) + torch.randn(2 * WIDTH, 64) @ shared / 4)
    hessian = moments.hessian / moments.tokens
    runs: dict[str, Callable[[], Tensor]] = {
        "rtn": lambda: round_to_nearest(weight, importance=moments.importance).dequantize(),
        "gptq": lambda: gptq(weight, moments).dequantize(),
        "unblocked column loop": lambda: unblocked(weight, moments),
    }
    for name, quantize in gptq_peers().items():
        runs[name] = lambda quantize=quantize: quantize(weight, hessian)
    rows = []
    for name, run in runs.items():
        began = time.perf_counter()
        error = run() - weight
        seconds = time.perf_counter() - began
        rows.append(
            {f"{WIDTH} x {WIDTH}": name, "s": seconds, "error": (error @ hessian * error).sum()}
        )
    named = dict(zip(runs, rows, strict=True))
    of_loop, of_rtn = named["unblocked column loop"]["s"], named["rtn"]["error"]
    for row in rows:
        row["of the loop"], row["error"] = row["s"] / of_loop, float(row["error"] / of_rtn)
    return rows


def wide() -> Rows:
    """One wide layer with fewer tokens than inputs, beside the arithmetic that nothing can save.

    The products are counted at the speed of a plain float32 matmul, measured here: second moments,
    the Cholesky factor and its inverse, and what each column changes in the columns after it.
    """
    inputs, outputs, tokens = 9216, 4096, 512
    operations = {
        "moments": 2.0 * tokens * inputs**2,
        "factor and its inverse": 2.0 * inputs**3 / 3,
        "column updates": 1.0 * inputs**2 * outputs,
        "two passes over the data": 4.0 * tokens * inputs * outputs,
    }
    left, right = torch.randn(2, 2048, 2048)
    matmul = median_seconds({"matmul": lambda: left @ right}, rounds=5)["matmul"]
    speed = 2.0 * 2048**3 / matmul
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=False))
    data = list(torch.randn(tokens, inputs).split(64))
    rows: Rows = [
        {"what": f"products: {name}", "s": count / speed} for name, count in operations.items()
    ]
    products = sum(row["s"] for row in rows)
    for method in ("rtn", "gptq"):
        began = time.perf_counter()
        _, info = fxquant.static_quantize(
            model, data, method=method, num_calibration_samples=tokens, accuracy_warning="ignore"
        )
        rows.append({"what": method, "s": time.perf_counter() - began, "dB": info.sqnr_db})
    for row in rows:
        row["of all products"] = row["s"] / products
    return rows


def stages() -> Rows:
    """Milliseconds a layer of each stage, for models of more and more layers."""
    _stages_of(2)  # imports and code paths are paid for once
    return [{"layers": count, **_stages_of(count)} for count in (8, 32, 128)]


def _stages_of(count: int) -> dict[str, float]:
    layers = [m for _ in range(count) for m in (nn.Linear(256, 256), nn.ReLU())]
    model, x = nn.Sequential(*layers).eval(), torch.randn(64, 256)
    quiet = {"accuracy_warning": "ignore"}
    times: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = run()
        times[f"{name} ms"] = 1e3 * (time.perf_counter() - began) / count
        return result

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        gm = timed("trace", lambda: fxquant.trace(model, x))
        observed = timed("insert", lambda: fxquant.insert_observers(gm))
        timed("calibrate", lambda: fxquant.calibrate(observed, [x], progress=False))
        q, _ = timed("quantize", lambda: fxquant.quantize(gm, **quiet))
        timed("gptq", lambda: fxquant.static_quantize(gm, [x], method="gptq", **quiet))
        timed("sensitivity", lambda: fxquant.sensitivity(gm, [x], progress=False))
        timed("save", lambda: fxquant.save_model(q, path))
        timed("load", lambda: fxquant.load_model(path))
    return times


TABLES: dict[str, tuple[str, Callable[[], Rows]]] = {
    "stack": ("quantize: time, and peak memory (resident set)", stack),
    "rounding": (f"time to quantize one {WIDTH} x {WIDTH} float32 weight", rounding),
    "calibration": ("time to calibrate", calibration),
    "gptq": ("gptq for one layer; its output's error against rtn's", gptq_layer),
    "wide": ("a layer of 9216 inputs and 4096 outputs, 512 tokens", wide),
    "stages": ("milliseconds a layer", stages),
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", help=", ".join(TABLES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    for name, (title, make) in TABLES.items():
        if not arguments.tables or name in arguments.tables:
            results[name] = make()
            report(title, results[name], None)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
