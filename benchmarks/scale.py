"""What a model of 135 million parameters costs to trace and to quantize: memory and CPU time.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/scale.py
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/scale.py gptq --json gptq.json
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/scale.py gptq --processes 2
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/scale.py folder

The model is a Llama made from a config, with seeded random weights: 30 layers of width 576, 9
heads, 3 of them for keys and values, a vocabulary of 49,152. The data are 64 windows of 256 tokens.
`--small` takes models and data that are done in seconds. Rows: `forward` (the float model reads the
data once), `trace`, methods of `quantize`, tracing included, `folder`: a Llama of 1.1
billion parameters (22 layers of width 2048) in bfloat16, from disk to disk without data, and the
other libraries of `scale_peers.py` that are installed. How good a result is, all are asked on the
same tokens, which none of them has seen: since the weights are random, as the SQNR of the logits
against the float model's, and not as a perplexity.

Each row is a process of its own, or several that share it (`--processes`): then the figures are
those of the process where they are largest, and `digest`, of all that the result holds, is the same
for any number of them. Beside what is measured stands what `fxquant.plan` predicts, and the
ratio of the two. "Memory beside the model" is the process's peak (VmHWM of
/proc/self/status) less what it had when the model stood and the imports were done; the quantized
model is part of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import scale_peers
import torch
import torch.distributed as dist
from timing import report
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxquant
from fxquant.numerics.digest import digest_of
from fxquant.numerics.metrics import SqnrMeter

METHODS = ("forward", "trace", "rtn", "gptq", "best", "folder", *scale_peers.PACKAGES)
QUANTIZING = ("rtn", "gptq", "best")  # methods of `quantize`
DEFAULT = ("forward", "trace", "gptq", "best")
CONFIG = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152,
}  # fmt: skip
SMALL = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
LARGE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32_000,
}  # fmt: skip
WINDOWS, LENGTH, ROWS = 64, 256, 8  # of a batch
SMALL_WINDOWS, SMALL_LENGTH, SMALL_ROWS = 16, 32, 4
UNSEEN_WINDOWS = 8


def language_model(sizes: dict[str, int]) -> nn.Module:
    """A Llama with seeded random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, tie_word_embeddings=True, use_cache=False)
    return LlamaForCausalLM(config).eval()


def token_batches(
    vocabulary: int, windows: int, length: int, rows: int, seed: int = 1
) -> list[dict[str, Tensor]]:
    """Random tokens, [rows, length] a batch."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (windows, length), generator=generator)
    return [{"input_ids": batch} for batch in tokens.split(rows)]


def run(
    method: str, model: nn.Module, batches: list[dict[str, Tensor]], memory: str | None = None
) -> tuple[nn.Module | None, dict[str, Any]]:
    """Do what a row stands for; the quantized model, and more about it."""
    if method == "forward":
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        return None, {}
    if method == "trace":
        gm = fxquant.trace(model, batches[0])
        return None, {"coverage": fxquant.trace_report(gm).coverage}
    qmodel, info = fxquant.quantize(
        model, batches, method=method, accuracy_warning="ignore", memory=memory
    )
    return qmodel, {"SQNR dB": info.sqnr_db, "layers": len(info.selected_layers)}


def digest(qmodel: nn.Module) -> str:
    """Of all that a model holds."""
    state = sorted(qmodel.state_dict().items())
    digests = [digest_of(name, str(t.dtype), t) for name, t in state]
    return sha256("".join(digests).encode()).hexdigest()[:12]


def run_peer(
    make: Callable[[list[dict[str, Tensor]]], nn.Module], batches: list[dict[str, Tensor]]
) -> tuple[nn.Module, dict[str, Any]]:
    """The same by another library."""
    return make(batches), {}


@torch.no_grad()
def unseen_sqnr(sizes: dict[str, int], qmodel: nn.Module, data: tuple[int, int, int]) -> float:
    """SQNR in dB of a quantized model's logits on tokens that nobody was given."""
    model, meter = language_model(sizes), SqnrMeter()
    for batch in token_batches(sizes["vocab_size"], UNSEEN_WINDOWS, data[1], 1, seed=2):
        meter.add(model(**batch).logits, qmodel(**batch).logits)
    return meter.db


def run_folder(source: Path, target: Path) -> tuple[None, dict[str, Any]]:
    """Quantize a folder into another without data."""
    info = fxquant.quantize_checkpoint(source, target, {"method": "rtn"})
    return None, {"layers": len(info.selected_layers)}


def save_folder(folder: Path, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """A Llama with seeded random weights as shards."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, use_cache=False, dtype=dtype)
    LlamaForCausalLM._from_config(config).save_pretrained(folder, max_shard_size="500MB")


def status_bytes(field: str) -> int:
    """A figure of /proc/self/status, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")


def measure(
    method: str,
    sizes: dict[str, int],
    data: tuple[int, int, int],
    bound: str | None,
    folder: Path,
) -> dict[str, Any]:
    """One row, in this process, which may be one of several.

    Args:
        method: of `METHODS`.
        sizes: of the model.
        data: windows, their length, and rows of a batch.
        bound: what is given as `memory`.
        folder: with the folders `small` and `large`, for `folder`.
    """
    # Imports and code paths are paid for once, by a small model.
    plan = None
    if method == "folder":
        work = partial(run_folder, folder / "large", folder / "large-int4")
        run_folder(folder / "small", folder / "small-int4")
        plan = partial(fxquant.plan, folder / "large", method="rtn")
    else:
        tiny, few = language_model(SMALL), token_batches(SMALL["vocab_size"], 2, 16, 1)
        model, batches = language_model(sizes), token_batches(sizes["vocab_size"], *data)
        if method in scale_peers.PACKAGES:
            run_peer(scale_peers.prepared(method, tiny, folder / "tiny"), few)
            work = partial(run_peer, scale_peers.prepared(method, model, folder / method), batches)
        else:
            run(method, tiny, few)
            work = partial(run, method, model, batches, bound)
        if method in QUANTIZING:
            plan = partial(fxquant.plan, model, batches, method=method, memory=bound)
    before, began, cpu = status_bytes("VmRSS"), time.perf_counter(), time.process_time()
    qmodel, more = work()
    memory = max(status_bytes("VmHWM") - before, 1) / 1e6
    seconds, wall = time.process_time() - cpu, time.perf_counter() - began
    row = {"what": method, "memory beside the model, MB": memory, "CPU s": seconds, "wall s": wall}
    if qmodel is not None:  # after the run, in whose figures it must not show
        row["unseen SQNR, dB"] = unseen_sqnr(sizes, qmodel, data)
        row["digest"] = digest(qmodel)
    if plan is not None:  # as well
        forecast = plan().forecast
        row |= {
            "predicted MB": forecast.memory_bytes / 1e6,
            "ratio of MB": forecast.memory_bytes / 1e6 / memory,
            "predicted s": forecast.seconds,
            "ratio of s": forecast.seconds / seconds,
        }
    return {**row, **more}


def measure_as(rank: int, processes: int, folder: Path, *arguments: Any) -> dict[str, Any]:
    """One row, as one of the processes that share it."""
    if processes > 1:
        store = dist.FileStore(str(folder / "store"), processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    return measure(*arguments, folder)


def in_processes(method: str, processes: int, folder: Path) -> dict[str, Any]:
    """One row, in processes of its own: a peak is a process's."""
    command = [sys.executable, __file__, method, *sys.argv[1:], "--folder", folder, "--inside"]
    running = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{method} has failed")
    (folder / "store").unlink(missing_ok=True)
    rows: list[dict[str, Any]] = [json.loads(text.splitlines()[-1]) for text in said]
    return {
        key: max(row[key] for row in rows) if isinstance(value, float) else value
        for key, value in rows[0].items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", help=", ".join(METHODS))
    parser.add_argument("--small", action="store_true", help="a model that takes seconds")
    parser.add_argument("--layers", type=int, help="other than the model has")
    parser.add_argument("--memory", help="that quantizing is given: 400MB")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processes", type=int, default=1, help="that share each row")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--inside", type=int, metavar="RANK", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = dict(SMALL if arguments.small else CONFIG)
    data = (SMALL_WINDOWS, SMALL_LENGTH, SMALL_ROWS) if arguments.small else (WINDOWS, LENGTH, ROWS)
    if arguments.layers:
        sizes["num_hidden_layers"] = arguments.layers
    processes = arguments.processes
    peers = scale_peers.installed() if processes == 1 else []
    methods = arguments.methods or [*DEFAULT, *peers]
    if arguments.inside is not None:
        work = methods[0], sizes, data, arguments.memory
        row = measure_as(arguments.inside, processes, arguments.folder, *work)
        print(json.dumps(row))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "folder" in methods:
            save_folder(folder / "small", SMALL, torch.float32)
            large = SMALL if arguments.small else LARGE
            save_folder(folder / "large", large, torch.bfloat16)
        rows = [in_processes(method, processes, folder) for method in methods]
    title = f"Llama, {sizes['num_hidden_layers']} x {sizes['hidden_size']}, {data[0]} windows"
    report(title, rows, arguments.json)


if __name__ == "__main__":
    main()
