"""Products of one row beside plain reading of as many bytes, in small pages and in large ones.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/reading.py

A product of one row reads its weight once, as a written token does. Weights of a language model's
MLP (5632 x 2048, group 32), together more than a cache holds, lie in torch's own memory and in
that of `kernels/large_pages.py`. GB a second, medians: of the processor's time on one thread, of
the clock's on several. `in the cache` is one weight small enough for it, again and again.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import fair_clock, median_seconds, report
from torch import Tensor

import fxquant
from fxquant.kernels.choose import choose_backend
from fxquant.kernels.interface import LinearSpec
from fxquant.numerics.weights import quantize_weight

SHAPE, CACHED, GROUP = (5632, 2048), (512, 2048), 32
REPEATS = 50
BITS = (4, 8)
ACTIVATIONS = {"float": "A16", "int8": "A8"}


def weights(bits: int, count: int, shape: tuple[int, int]) -> list[Tensor]:
    """Packed weights that differ, as a kernel holds them."""
    torch.manual_seed(0)
    made = []
    for _ in range(count):
        weight = quantize_weight(torch.randn(shape), bits, GROUP, True)
        made.append(fxquant.QuantizedLinearIntN(weight, None).packed_memory)
    return made


def product(bits: int, activation: str, shape: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """One row of bfloat16 times a packed weight."""
    spec = LinearSpec(*shape, GROUP, True, activation, bits)
    backend, _ = choose_backend(spec, torch.device("cpu"))
    x = torch.randn(1, shape[1]).bfloat16()
    return lambda packed: backend.matmul(x, (packed,), spec)


def read(packed: Tensor) -> Tensor:
    """Their sum as numbers of 8 bytes."""
    return packed.view(torch.int64).sum()


def rates(count: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of product, and for reading."""
    rows = []
    for bits in BITS:
        large = weights(bits, count, SHAPE)
        places = {"small pages": [tensor.clone() for tensor in large], "large pages": large}
        cached = weights(bits, 1, CACHED) * REPEATS
        kinds: dict[str, Any] = {
            f"W{bits}{name}": [product(bits, activation, shape) for shape in (SHAPE, CACHED)]
            for activation, name in ACTIVATIONS.items()
        }
        if bits == BITS[0]:
            kinds = {"reading": [read, read], **kinds}
        turns, sizes = {}, {}
        for kind, (run, run_cached) in kinds.items():
            for place, tensors in {**places, "in the cache": cached}.items():
                call = run_cached if tensors is cached else run
                turns[kind, place] = lambda call=call, given=tensors: [call(t) for t in given]
                sizes[kind, place] = sum(tensor.numel() for tensor in tensors) / 1e9
        names = {f"{kind}|{place}": key for key in turns for kind, place in [key]}
        timed = {name: turns[key] for name, key in names.items()}
        seconds = median_seconds(timed, rounds, clock=fair_clock())
        for kind in kinds:
            found = {p: sizes[kind, p] / seconds[f"{kind}|{p}"] for p in (*places, "in the cache")}
            rows.append({"": kind, **found})
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=32, help="of weights, 6.5 MB each in INT4")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with torch.inference_mode():
        rows = rates(arguments.count, arguments.rounds)
    report(f"GB a second, one row, {torch.get_num_threads()} threads", rows, arguments.json)


if __name__ == "__main__":
    main()
