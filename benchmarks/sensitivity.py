"""What the three sensitivity methods cost, in float passes and against a naive scan.

OMP_WAIT_POLICY=passive python benchmarks/sensitivity.py
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from timing import median_seconds, report
from torch import nn

from fxquant import trace
from fxquant.analysis.candidates import find_candidates
from fxquant.analysis.exact import measure_exact
from fxquant.analysis.gradient import measure_gradient
from fxquant.config.quant_config import QuantConfig
from fxquant.demo.language_model import calibration_tokens, load_language_model
from fxquant.graph.calls import Call
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.structures import main_output
from fxquant.measure.paired_run import run_paired
from fxquant.numerics.integers import WIDTHS
from fxquant.passes.decide import decide
from fxquant.passes.rewrite import rewrite
from fxquant.passes.rounded_layers import RoundedLayers


class Chain(nn.Module):
    """Equal residual blocks."""

    def __init__(self, blocks: int = 12, width: int = 512) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [rows, tokens, width]."""
        for block in self.blocks:
            x = x + torch.nn.functional.gelu(block(x))
        return x


def naive(gm: Any, candidates: Any, layers: RoundedLayers, calls: Any) -> None:
    """One full run for each layer and width."""
    with torch.no_grad():
        for call in calls:
            gm(*call.args)
            for candidate in candidates:
                for width in WIDTHS:
                    module = layers.quantize(candidate.name, candidate.layer, width)
                    with candidate.replaced_by(module):
                        gm(*call.args)


def measure(name: str, model: nn.Module, inputs: list[torch.Tensor]) -> dict[str, Any]:
    """One row: seconds of each method, and the ratios that matter."""
    gm = copy_sharing_tensors(trace(model, inputs[0]), frozen=True)
    calls = [Call((x,)) for x in inputs]
    decisions = decide(gm, QuantConfig())
    layers = RoundedLayers(QuantConfig())
    qmodel = rewrite(gm, decisions, layers.quantize)
    candidates = find_candidates(gm, [d.module for d in decisions if d.bits])
    common = (gm, candidates, WIDTHS, calls, layers.quantize, main_output)
    for candidate in candidates:
        for width in WIDTHS:
            layers.quantize(candidate.name, candidate.layer, width)

    def float_pass() -> None:
        with torch.no_grad():
            for x in inputs:
                gm(x)

    seconds = median_seconds(
        {
            "float pass": float_pass,
            "local": lambda: run_paired(gm, qmodel, calls),
            "gradient": lambda: measure_gradient(*common),
            "exact": lambda: measure_exact(*common),
            "naive": lambda: naive(gm, candidates, layers, calls),
        },
        rounds=5,
        warm_up=1,
    )
    return {
        "model": name,
        "layers": len(candidates),
        "float pass s": seconds["float pass"],
        "local/float": seconds["local"] / seconds["float pass"],
        "gradient/float": seconds["gradient"] / seconds["float pass"],
        "exact/naive": seconds["exact"] / seconds["naive"],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [
        measure("chain of 12 equal blocks", Chain(), [torch.randn(8, 128, 512)]),
        measure("embedded language model", load_language_model(), [calibration_tokens()[::24]]),
    ]
    report("sensitivity: time against float passes and a naive scan", rows, arguments.json)


if __name__ == "__main__":
    main()
