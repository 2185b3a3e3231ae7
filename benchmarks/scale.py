"""What a model of 135 million parameters costs to trace and to quantize: memory and CPU time.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/scale.py
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/scale.py gptq --json gptq.json

The model is a Llama made from a config, with seeded random weights: 30 layers of width 576, 9
heads, 3 of them for keys and values, a vocabulary of 49,152. The data are 64 windows of 256 tokens.
`--small` takes a model and data that are done in seconds. Rows: `forward` (the float model reads
the data once), `trace`, and methods of `static_quantize`, tracing included.

Each row is a process of its own. "Memory beside the model" is the process's peak (VmHWM of
/proc/self/status) less what it had when the model stood and the imports were done; the quantized
model is part of it.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timing import report
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxquant

METHODS = ("forward", "trace", "rtn", "gptq", "best")
DEFAULT = ("forward", "trace", "gptq", "best")
CONFIG = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152,
}  # fmt: skip
SMALL = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 512,
}  # fmt: skip
WINDOWS, LENGTH, ROWS = 64, 256, 8  # of a batch
SMALL_WINDOWS, SMALL_LENGTH, SMALL_ROWS = 16, 32, 4


def language_model(sizes: dict[str, int]) -> nn.Module:
    """A Llama with seeded random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, tie_word_embeddings=True, use_cache=False)
    return LlamaForCausalLM(config).eval()


def token_batches(vocabulary: int, windows: int, length: int, rows: int) -> list[dict[str, Tensor]]:
    """Random tokens, [rows, length] a batch."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocabulary, (windows, length), generator=generator)
    return [{"input_ids": batch} for batch in tokens.split(rows)]


def run(method: str, model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Do what a row stands for; more about its result."""
    if method == "forward":
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        return {}
    if method == "trace":
        return {"coverage": fxquant.trace_report(fxquant.trace(model, batches[0])).coverage}
    _, info = fxquant.static_quantize(model, batches, method=method, accuracy_warning="ignore")
    return {"SQNR dB": info.sqnr_db, "layers": len(info.selected_layers)}


def status_bytes(field: str) -> int:
    """A figure of /proc/self/status, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")


def measure(method: str, sizes: dict[str, int], data: tuple[int, int, int]) -> dict[str, Any]:
    """One row, in this process."""
    tiny = language_model(SMALL)  # imports and code paths are paid for once, by a small model
    run(method, tiny, token_batches(SMALL["vocab_size"], 2, 16, 1))
    model = language_model(sizes)
    batches = token_batches(sizes["vocab_size"], *data)
    before, began, cpu = status_bytes("VmRSS"), time.perf_counter(), time.process_time()
    more = run(method, model, batches)
    return {
        "what": method,
        "memory beside the model, MB": (status_bytes("VmHWM") - before) / 1e6,
        "CPU s": time.process_time() - cpu,
        "wall s": time.perf_counter() - began,
        **more,
    }


def in_a_process(method: str) -> dict[str, Any]:
    """One row, in a process of its own: a peak is the process's."""
    command = [sys.executable, __file__, method, *sys.argv[1:], "--inside"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", help=", ".join(METHODS))
    parser.add_argument("--small", action="store_true", help="a model that takes seconds")
    parser.add_argument("--layers", type=int, help="other than the model has")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = dict(SMALL if arguments.small else CONFIG)
    data = (SMALL_WINDOWS, SMALL_LENGTH, SMALL_ROWS) if arguments.small else (WINDOWS, LENGTH, ROWS)
    if arguments.layers:
        sizes["num_hidden_layers"] = arguments.layers
    if arguments.inside:
        print(json.dumps(measure(arguments.methods[0], sizes, data)))
        return
    rows = [in_a_process(method) for method in arguments.methods or DEFAULT]
    title = f"Llama, {sizes['num_hidden_layers']} x {sizes['hidden_size']}, {data[0]} windows"
    report(title, rows, arguments.json)


if __name__ == "__main__":
    main()
