"""What quantized convolutions keep of vision models: 8 and 4 bits, by rounding and fitted.

    pip install timm torchvision
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/vision.py
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/vision.py --model resnet18

The models have timm's architecture and random weights, so nothing is downloaded; the statistics of
their norms are those of the calibration pictures, from one pass in training mode. Pictures are
64 x 64, smooth with noise. Figures are SQNR in dB of the model's outputs on pictures that nothing
else has seen, against the user's own model. 4 bits have groups of 32 along a kernel's inputs; a
layer with fewer inputs gets 8 bits.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timing import report
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fxquant
from fxquant.measure.sizes import MEGABYTE, model_bytes

MODELS = {
    "resnet18": "resnet18",
    "mobilenetv3": "mobilenetv3_small_100",
    "convnext": "convnext_tiny",
}
BATCHES, BATCH, SIZE = 6, 8, 64
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


def pictures(count: int, seed: int) -> list[Tensor]:
    """Batches of pictures [batch, 3, size, size]."""
    source = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count * BATCH, 3, 8, 8, generator=source)
    smooth = F.interpolate(coarse, size=SIZE, mode="bilinear")
    noisy = smooth + 0.3 * torch.randn(smooth.shape, generator=source)
    return list(noisy.split(BATCH))


def made(name: str, data: list[Tensor]) -> nn.Module:
    """A model in evaluation mode whose norms have the statistics of the data."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(MODELS[name], pretrained=False, drop_rate=0.0)
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


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--method", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    data, unseen = pictures(BATCHES, seed=0), torch.cat(pictures(2, seed=1))
    table: list[dict[str, Any]] = []
    for name in arguments.model:
        model = made(name, data)
        rows: list[dict[str, Any]] = []
        for method in arguments.method:
            began = time.perf_counter()
            other = quantized(model, data, method)
            seconds = time.perf_counter() - began
            with torch.no_grad():
                figure = fxquant.sqnr_db(model(unseen), other(unseen))
            size, nodes = model_bytes(other) / MEGABYTE, len(other.graph.nodes)
            rows.append({"method": method, "SQNR dB": figure, "MB": size, "nodes": nodes,
                         "seconds": seconds})  # fmt: skip
        size = model_bytes(model) / MEGABYTE
        report(f"{MODELS[name]}, {size:.1f} MB in float32", rows, None)
        table += [{"model": name, **row} for row in rows]
    if arguments.json is not None:
        report("all", table, arguments.json)


if __name__ == "__main__":
    main()
