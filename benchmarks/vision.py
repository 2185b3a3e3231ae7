"""What quantized convolutions keep of vision models: 8 and 4 bits, by rounding and fitted.

    pip install timm torchvision
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/vision.py
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/vision.py --size 224

The models have timm's architecture and random weights, so nothing is downloaded; the statistics of
their norms are those of the calibration pictures, from one pass in training mode. Pictures are
square, smooth with noise. Figures are SQNR in dB of the model's outputs on pictures that nothing
else has seen, against the user's own model. 4 bits have groups of 32 along a kernel's inputs; a
layer with fewer inputs gets 8 bits.

`time` is that of two pictures at once over that of the float model in torch; candidates take turns,
medians count: of the processor's time on one thread, of the clock's on several. Where OpenVINO and
NNCF are installed, their float model (in float32, and in what OpenVINO chooses) and their 8-bit one
(weights and static activations, calibrated on the same pictures) stand in the same table.
"""

import argparse
import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timing import fair_clock, median_seconds, report
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fxquant
from fxquant.measure.sizes import MEGABYTE, model_bytes

MODELS = {
    "resnet18": "resnet18",
    "mobilenetv3": "mobilenetv3_small_100",
    "convnext": "convnext_tiny",
    "vit": "vit_small_patch16_224",
}
Run = Callable[[Tensor], Tensor]
BATCHES, BATCH, TIMED = 6, 8, 2
NORMS_APART = "8 bits, norms apart"
METHODS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8, "method": "rtn"},
    NORMS_APART: {"bits": 8, "method": "rtn"},
    "8 bits, static activations": {"bits": 8, "method": "rtn", "activation_bits": 8},
    "8 bits, dynamic activations": {
        "bits": 8, "method": "rtn", "activation_bits": 8, "observer": "dynamic",
    },
    "4 bits, rtn": {"bits": 4, "method": "rtn"},
    "4 bits, gptq": {"bits": 4, "method": "gptq"},
}  # fmt: skip

FAST = ("8 bits", "8 bits, dynamic activations")  # also timed fused and in bfloat16
FUSED = ("8 bits, static activations",)  # also timed fused: integers go from layer to layer


def pictures(count: int, size: int, seed: int) -> list[Tensor]:
    """Batches of pictures [batch, 3, size, size]."""
    source = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count * BATCH, 3, 8, 8, generator=source)
    smooth = F.interpolate(coarse, size=size, mode="bilinear")
    noisy = smooth + 0.3 * torch.randn(smooth.shape, generator=source)
    return list(noisy.split(BATCH))


def made(name: str, data: list[Tensor]) -> nn.Module:
    """A model in evaluation mode whose norms have the statistics of the data."""
    torch.manual_seed(0)
    sizes = {"img_size": data[0].shape[-1]} if name == "vit" else {}
    model: nn.Module = timm.create_model(MODELS[name], pretrained=False, drop_rate=0.0, **sizes)
    for part in model.modules():
        if isinstance(part, _BatchNorm):
            part.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.cat(data))
    return model.eval()


def quantized(model: nn.Module, data: list[Tensor], method: str) -> torch.fx.GraphModule:
    """A graph by one of `METHODS`."""
    norms = [name for name, part in model.named_modules() if isinstance(part, _BatchNorm)]
    kept = norms if method == NORMS_APART else []
    return fxquant.quantize(
        model,
        data,
        group_size=32,
        modules_to_not_convert=kept,
        accuracy_warning="ignore",
        **METHODS[method],
    )[0]


def in_bfloat16(model: nn.Module) -> Run:
    """A copy of a module in bfloat16."""
    half = copy.deepcopy(model).bfloat16()
    return lambda x: half(x.bfloat16()).float()


def theirs(model: nn.Module, data: list[Tensor]) -> Iterator[tuple[str, Run]]:
    """What OpenVINO runs, if it is installed."""
    try:
        openvino, nncf = map(importlib.import_module, ("openvino", "nncf"))
    except ImportError:
        return
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    exactly = {**threads, "INFERENCE_PRECISION_HINT": "f32"}
    exact = openvino.convert_model(model, example_input=data[0])
    pictures_of_data = nncf.Dataset(data, lambda batch: batch.numpy())
    eight = nncf.quantize(exact, pictures_of_data)
    for name, made, config in (
        ("OpenVINO, float32", exact, exactly),
        ("OpenVINO, its own choice", exact, threads),
        ("OpenVINO, 8 bits, static (NNCF)", eight, threads),
    ):
        request = openvino.Core().compile_model(made, "CPU", config).create_infer_request()
        yield name, lambda x, run=request.infer: torch.from_numpy(run([x.numpy()])[0].copy())


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--method", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    data = pictures(BATCHES, arguments.size, seed=0)
    unseen = torch.cat(pictures(2, arguments.size, seed=1))
    table: list[dict[str, Any]] = []
    for name in arguments.model:
        model = made(name, data)
        candidates: dict[str, Run] = {"float32": model, "bfloat16": in_bfloat16(model)}
        graphs = {method: quantized(model, data, method) for method in arguments.method}
        candidates |= graphs
        for method in FAST:
            if method in graphs:
                fast = in_bfloat16(fxquant.fuse(graphs[method]))
                candidates[f"{method}, fused, bfloat16"] = fast
        for method in FUSED:
            if method in graphs:
                candidates[f"{method}, fused"] = fxquant.fuse(graphs[method])
        candidates |= dict(theirs(model, data))
        rows: list[dict[str, Any]] = []
        with torch.inference_mode():
            runs = {key: lambda run=run: run(unseen[:TIMED]) for key, run in candidates.items()}
            seconds = median_seconds(runs, arguments.rounds, clock=fair_clock())
            expected = model(unseen)
            for key, run in candidates.items():
                row = {"method": key, "time": seconds[key] / seconds["float32"]}
                if run is not model:
                    row["SQNR dB"] = fxquant.sqnr_db(expected, run(unseen))
                if isinstance(run, torch.fx.GraphModule):
                    row |= {"MB": model_bytes(run) / MEGABYTE, "nodes": len(run.graph.nodes)}
                rows.append(row)
        size = model_bytes(model) / MEGABYTE
        title = f"{MODELS[name]}, {arguments.size} x {arguments.size}, {size:.1f} MB in float32"
        report(title, rows, None)
        table += [{"model": name, **row} for row in rows]
    if arguments.json is not None:
        report("all", table, arguments.json)


if __name__ == "__main__":
    main()
