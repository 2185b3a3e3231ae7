"""What models of 1, 7 and 70 billion parameters would take, on this machine and on larger ones.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/on_paper.py
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/on_paper.py --plan 70

Nothing is quantized: the models are Llamas made from configs, without weights, and the figures are
those of `fxquant plan FOLDER` on their folders (`fxquant/planning`, which says what is assumed):
`gptq` in groups of 128 with 128 windows of 2048 tokens in batches of 2 and `memory="16GB"`, and
rounding without data. A core is one process with one thread of this machine, and processes are
taken to be as fast together as alone: no exchange, and no shared memory bus, slows them down.
`--plan` prints the whole forecast of one of the models.
"""

import argparse
from pathlib import Path

import torch
from timing import report
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fxquant.config.memory import memory_bytes
from fxquant.config.method import parse_method
from fxquant.config.quant_config import QuantConfig
from fxquant.exporters.stream import for_folder
from fxquant.graph.calls import Call
from fxquant.passes.decide import decide
from fxquant.planning.folder import forecast_folder
from fxquant.planning.forecast import Forecast
from fxquant.planning.speed import Speed
from fxquant.planning.work import LayerWork
from fxquant.tracing.opaque import graph_around

SIZES = {
    1: {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32_000,
    },
    7: {
        "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32_000,
    },
    70: {
        "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256,
    },
}  # fmt: skip
CORES = (2, 16, 64)
WINDOWS, LENGTH, ROWS, MEMORY = 128, 2048, 2, "16GB"


def forecast_of(model: LlamaForCausalLM, method: str, *, has_data: bool) -> Forecast:
    """Of a model without weights."""
    config = for_folder(QuantConfig(method=method))
    windows = torch.zeros(WINDOWS, LENGTH, dtype=torch.long).split(ROWS)
    drawn = [Call.of({"input_ids": batch}) for batch in windows] if has_data else None
    recipe = parse_method(method, has_data=has_data)
    decisions = decide(graph_around(model, None), config)
    return forecast_folder(model, decisions, config, recipe, drawn, memory_bytes(MEMORY))


def model_of(billions: int) -> LlamaForCausalLM:
    """The Llama of this size, on meta, in bfloat16."""
    with torch.device("meta"):
        config = LlamaConfig(**SIZES[billions], use_cache=False, dtype=torch.bfloat16)
        model: LlamaForCausalLM = LlamaForCausalLM._from_config(config).eval()
    return model


def main() -> None:
    """Print the table, or one forecast."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=int, choices=list(SIZES), help="print its forecast")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.plan:
        print("\n".join(forecast_of(model_of(arguments.plan), "gptq", has_data=True).lines()))
        return
    rows = []
    for billions in SIZES:
        model = model_of(billions)
        count = sum(p.numel() for p in model.parameters())
        for method, has_data in (("rtn", False), ("gptq", True)):
            forecast = forecast_of(model, method, has_data=has_data)
            rows.append({
                "parameters": f"{count / 1e9:.1f} B",
                "method": method,
                "memory, GB": forecast.memory_bytes / 1e9,
                "file, GB": forecast.output_bytes / 1e9,
                "waiting on disk, GB": forecast.spilled_bytes / 1e9,
                "s / million": forecast.seconds / count * 1e6,
                **{f"h, {n} cores": forecast.seconds_on(n) / 3600 for n in CORES},
            })  # fmt: skip
    title = f"on paper: {WINDOWS} windows of {LENGTH} tokens, {MEMORY}; {core_speed()}"
    report(title, rows, arguments.json)


def core_speed() -> str:
    """What a core of this machine does, as forecasts know it."""
    config = QuantConfig(method="gptq")
    speed = Speed(config, parse_method("gptq", has_data=True))
    linear = nn.Linear(4096, 4096, bias=False, device="meta", dtype=torch.bfloat16)
    layer = LayerWork.of(linear, 4, config)
    flops = {
        "bfloat16": speed.flops(layer),
        "quantized": speed.quantized_flops(layer),
        "float32": speed.moment_flops(layer),
    }
    return ", ".join(f"{name} {value / 1e9:.1f} GFLOP/s" for name, value in flops.items())


if __name__ == "__main__":
    main()
