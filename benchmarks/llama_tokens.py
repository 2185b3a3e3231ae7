"""A Llama of 1.1 billion parameters, token by token: torch, fxquant and llama.cpp.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python benchmarks/llama_tokens.py

The shape of TinyLlama (width 2048, 22 layers, 32 heads of queries on 4 of keys and values, 32000
tokens) with random weights in bfloat16, since only time is measured, quantized without data to
INT4 with a scale for 32 weights, the head to INT8. The copy that `swap_modules` gives runs in
transformers with fxquant's attention; `fused` is what `fuse_modules` makes of it, with the cache of
fxquant, `RoomyCache`. Beside it stand two files in llama.cpp (`llama-cpp-python`, if that is
installed): that of its own quantizer (Q4_0, its head in Q6_K) and the one that fxquant exports
(Q4_0, its head in Q8_0).

`written` are tokens a second, one after another, behind so many; `read` are tokens a second of a
prompt of 256. Candidates take turns in one process, medians count: of the processor's time on one
thread, of the clock's on several.
"""

import argparse
import copy
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from timing import fair_clock, median_seconds, report
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

import fxquant
from fxquant.integrations.transformers import RoomyCache

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
try:
    import llama_cpp
    from run_in_llama_cpp import write_gguf
except ImportError:
    llama_cpp = None

CONTEXTS = (32, 256)  # tokens before those that are written
PROMPT = max(CONTEXTS)
WRITTEN = 8  # tokens in a turn
MEGABYTE = 10**6


class Candidate(Protocol):
    """A model in a runtime, with keys and values of the tokens that it was given."""

    def read(self, tokens: list[int]) -> None:
        """Forget everything, and read a text."""

    def write(self, context: int, count: int) -> None:
        """Forget all but the first `context` tokens, and write `count` more."""


class InTransformers:
    """A Llama of transformers; `model` is changed to use an attention of this name."""

    def __init__(
        self, model: LlamaForCausalLM, attention: str = "sdpa", kind: type[Cache] = DynamicCache
    ) -> None:
        model.set_attn_implementation(attention)
        self.model, self.kind = model, kind
        self.cache = kind(config=model.config)

    def read(self, tokens: list[int]) -> None:
        """See `Candidate`."""
        self.cache = self.kind(config=self.model.config)
        self._next(torch.tensor([tokens]))

    def write(self, context: int, count: int) -> None:
        """See `Candidate`."""
        surplus = self.cache.get_seq_length() - context
        if surplus > 0:
            self.cache.crop(-surplus)
        token = torch.tensor([[1]])
        for _ in range(count):
            token = self._next(token)

    def _next(self, tokens: torch.Tensor) -> torch.Tensor:
        output = self.model(input_ids=tokens, past_key_values=self.cache, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True)


class InLlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path) -> None:
        threads = torch.get_num_threads()
        self.model = llama_cpp.Llama(
            str(path), n_ctx=2 * PROMPT, n_threads=threads, n_threads_batch=threads,
            n_gpu_layers=0, verbose=False, n_batch=PROMPT, n_ubatch=PROMPT,
        )  # fmt: skip

    def read(self, tokens: list[int]) -> None:
        """See `Candidate`."""
        self.model.reset()
        self.model.eval(tokens)

    def write(self, context: int, count: int) -> None:
        """See `Candidate`."""
        self.model.n_tokens, token = context, 1
        for _ in range(count):
            self.model.eval([token])
            token = int(self.model.scores[-1].argmax())


def float_model(layers: int) -> LlamaForCausalLM:
    """TinyLlama's shape, with random weights in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, vocab_size=32000,
        max_position_embeddings=2048, dtype=torch.bfloat16,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def ours(model: LlamaForCausalLM, path: Path | None) -> Iterator[tuple[str, Candidate]]:
    """Swapped copies; the graph is exported to `path` on top of the float file there."""
    example = {"input_ids": torch.arange(16)[None]}
    graph, _ = fxquant.quantize(
        model, example_inputs=example, method="rtn", target="gguf", group_size=32,
        bits={"*": 4, "lm_head": 8}, accuracy_warning="ignore",
    )  # fmt: skip
    if path is not None:
        fxquant.export(graph, path.with_name("ours.gguf"), format="gguf", base=path)
    four = fxquant.swap_modules(model, graph, share_memory=True)
    del graph
    for name, activation in (("W4A16", "float"), ("W4A8", "int8")):
        made = copy.deepcopy(four)
        for layer in made.modules():
            if isinstance(layer, fxquant.QuantizedLinearIntN):
                layer.activation = activation
        yield f"fxquant {name}", InTransformers(made, "fxquant")
        fused = fxquant.fuse_modules(made, share_memory=True)
        yield f"fxquant {name}, fused", InTransformers(fused, "fxquant", RoomyCache)


def of_llama_cpp(base: Path) -> Path:
    """The file that llama.cpp's quantizer makes of the float one."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread = torch.get_num_threads()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    path = base.with_name("theirs.gguf")
    status = llama_cpp.llama_model_quantize(bytes(base), bytes(path), options)
    if status != 0:
        raise RuntimeError(f"llama.cpp's quantizer failed with status {status}")
    return path


def candidates(folder: Path, layers: int, with_float: bool) -> dict[str, Candidate]:
    """Every runtime by its name; files are made in `folder`, and deleted."""
    model, base = float_model(layers), None
    if llama_cpp is not None:
        base = folder / "float.gguf"
        write_gguf(model, base)
    found = dict(ours(model, base))
    if base is not None:
        for name, path in (("its own", of_llama_cpp(base)), ("ours", folder / "ours.gguf")):
            found[f"llama.cpp, Q4_0, {name}"] = InLlamaCpp(path)
            path.unlink()
        base.unlink()
    if with_float:
        found["bfloat16 in torch"] = InTransformers(model)
        found["float32 in torch"] = InTransformers(copy.deepcopy(model).float())
    del model
    gc.collect()
    return found


def table(made: dict[str, Candidate], rounds: int) -> list[dict[str, Any]]:
    """A row for each candidate."""
    prompt = torch.randint(0, 32000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    turns: dict[str, Callable[[], Any]] = {}
    for name, candidate in made.items():
        turns[f"{name} | read"] = lambda c=candidate: c.read(prompt)
        for context in reversed(CONTEXTS):
            turns[f"{name} | {context}"] = lambda c=candidate, n=context: c.write(n, WRITTEN)
    seconds = median_seconds(turns, rounds, warm_up=1, clock=fair_clock())
    return [
        {
            "": name,
            **{f"written behind {n}": WRITTEN / seconds[f"{name} | {n}"] for n in CONTEXTS},
            f"read of {PROMPT}": PROMPT / seconds[f"{name} | read"],
        }
        for name in made
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--without-float", action="store_true", help="leave out torch's own")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        made = candidates(Path(folder), arguments.layers, not arguments.without_float)
        rows = table(made, arguments.rounds)
    title = (
        f"A Llama of {arguments.layers} layers, tokens a second, {torch.get_num_threads()} threads"
    )
    report(title, rows, arguments.json)


if __name__ == "__main__":
    main()
