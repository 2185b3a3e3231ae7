"""Fused graphs beside plain ones and torch: a sentence encoder, and a token of a language model.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/fusion.py
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/fusion.py decoding

all-MiniLM-L6-v2 (the extra `minilm`), 32 sentences at once and one alone, and one decoding step of
a layer of a language model of 1.1 B parameters (32 heads of queries on 4 of keys and values, a
cache of 272 tokens). `time / torch` is the median time over that of float32 in torch, `fused /
plain` over that of the graph before `fuse`; `dB` is the SQNR against the graph before `fuse`.
Candidates take turns, medians count. On one thread the time is that of the processor, which other
jobs of the machine disturb less.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import fair_clock, median_seconds, report
from torch import Tensor, nn
from transformers import AutoModel

import fxquant

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from minilm import batches, model_folder, sentences

GROUP = 128
Inputs = dict[str, Tensor]
Quantize = Callable[[nn.Module], torch.fx.GraphModule]
BFLOAT16 = "bfloat16"


class DecodingLayer(nn.Module):
    """A layer of a Llama that reads one token, with the keys and values of those before it."""

    def __init__(self, width: int = 2048, heads: int = 32, key_heads: int = 4) -> None:
        super().__init__()
        self.heads, self.key_heads, self.size = heads, key_heads, width // heads
        self.norm_1, self.norm_2 = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, key_heads * self.size, bias=False)
        self.v = nn.Linear(width, key_heads * self.size, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 5632, bias=False) for _ in range(2))
        self.down = nn.Linear(5632, width, bias=False)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Map `x` [batch, 1, width], with a cache [batch, key heads, tokens, size] each."""
        y = self.rms(x, self.norm_1)
        q = self.q(y).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k = self.k(y).unflatten(-1, (self.key_heads, self.size)).transpose(1, 2)
        v = self.v(y).unflatten(-1, (self.key_heads, self.size)).transpose(1, 2)
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(-2))
        y = self.rms(x, self.norm_2)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    @staticmethod
    def rms(x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm as transformers writes it out."""
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * y.to(x.dtype)


def first(output: Any) -> Tensor:
    """The first tensor of an output."""
    return output if isinstance(output, Tensor) else first(output[0])


def with_int8(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy whose layers round activations to int8 on the fly."""
    made = copy.deepcopy(graph)
    for layer in made.modules():
        if isinstance(layer, fxquant.QuantizedLinearInt4):
            layer.activation = "int8"
    return made


def candidates(model: nn.Module, quantize: Quantize) -> Iterator[tuple[str, nn.Module, Any]]:
    """A name, what runs, and the graph before it was fused (None: it is no fused graph)."""
    small = copy.deepcopy(model).to(torch.bfloat16)
    yield "float32 in torch", model, None
    yield f"{BFLOAT16} in torch", small, None
    graph = quantize(model)
    for name, plain in (
        ("W4A16", graph),
        ("W4A8", with_int8(graph)),
        (f"W4A8, {BFLOAT16} model", with_int8(quantize(small))),
    ):
        yield name, plain, None
        yield f"{name}, fused", fxquant.fuse(plain), plain


def cast(inputs: Inputs, name: str) -> Inputs:
    """Floating inputs in the dtype of a candidate."""
    dtype = torch.bfloat16 if BFLOAT16 in name else torch.float32
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def table(
    model: nn.Module, quantize: Quantize, subjects: dict[str, Inputs], rounds: int
) -> list[dict[str, Any]]:
    """One row a candidate and subject."""
    made = list(candidates(model, quantize))
    rows = []
    for subject, inputs in subjects.items():
        given = {name: cast(inputs, name) for name, *_ in made}
        runs: dict[str, Callable[[], Any]] = {
            name: lambda run=run, call=given[name]: run(**call) for name, run, _ in made
        }
        seconds = median_seconds(runs, rounds, clock=fair_clock())
        plain_seconds = {id(run): seconds[name] for name, run, _ in made}
        for name, run, plain in made:
            row: dict[str, Any] = {
                subject: name,
                "ms": 1000 * seconds[name],
                "time / torch": seconds[name] / seconds["float32 in torch"],
            }
            if plain is not None:
                row["fused / plain"] = seconds[name] / plain_seconds[id(plain)]
                call = given[name]
                row["dB"] = fxquant.sqnr_db(first(plain(**call)), first(run(**call)))
            rows.append(row)
    return rows


def minilm(rounds: int, path: Path | None) -> None:
    """The sentence encoder."""
    folder = model_folder()
    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    data = batches(sentences("heldout", 64), folder)

    def quantize(model: nn.Module) -> torch.fx.GraphModule:
        return fxquant.quantize(
            model, example_inputs=data[0], method="rtn", group_size=GROUP,
            modules_to_not_convert=["pooler"], accuracy_warning="ignore",
        )[0]  # fmt: skip

    one = {name: tensor[:1, :16] for name, tensor in data[0].items()}
    for title, inputs in (("32 sentences", data[0]), ("one sentence of 16 tokens", one)):
        report(f"all-MiniLM-L6-v2, {torch.get_num_threads()} threads",
               table(model, quantize, {title: inputs}, rounds), path)  # fmt: skip


def decoding(rounds: int, path: Path | None) -> None:
    """One token of a layer of a language model."""
    torch.manual_seed(0)
    model = DecodingLayer().eval()
    inputs = {
        "x": torch.randn(1, 1, 2048),
        "keys": torch.randn(1, 4, 272, 64),
        "values": torch.randn(1, 4, 272, 64),
    }

    def quantize(model: nn.Module) -> torch.fx.GraphModule:
        given = cast(inputs, str(next(model.parameters()).dtype))
        return fxquant.quantize(
            model, example_inputs=given, group_size=GROUP, method="rtn", accuracy_warning="ignore"
        )[0]

    title = f"a layer of 1.1 B parameters' Llama, {torch.get_num_threads()} threads"
    report(title, table(model, quantize, {"one token, 272 before it": inputs}, rounds), path)


SUBJECTS: dict[str, Callable[[int, Path | None], None]] = {"minilm": minilm, "decoding": decoding}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subjects", nargs="*", help=f"of {', '.join(SUBJECTS)}; by default all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not set(arguments.subjects) <= set(SUBJECTS):
        parser.error(f"there is no {arguments.subjects}; there are {', '.join(SUBJECTS)}")
    with torch.inference_mode():
        for name in arguments.subjects or SUBJECTS:
            SUBJECTS[name](arguments.rounds, arguments.json)


if __name__ == "__main__":
    main()
