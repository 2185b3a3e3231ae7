"""A small Llama in llama.cpp: INT4 of fxquant beside llama.cpp's own, accuracy, speed and size.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/llama_cpp_runtime.py

The embedded language model (`fxquant.demo`) as a Llama, its 28 linear layers in Q4_0, a scale for
32 weights, and all else in float32: rounded by llama.cpp's quantizer, and by fxquant without data
and fitted with gptq to the training text. Each file is run by llama.cpp; our graphs by torch too.

`perplexity` is that of each next byte in text that neither training nor calibration saw, `to float`
the SQNR of its logits against the float model, `to ours` that against the graph with the same
weights. Candidates take turns to read a window of 256 bytes, medians count: of the processor's time
on one thread, of the clock's on several.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import torch
from timing import fair_clock, median_seconds, report
from torch import Tensor

import fxquant
from fxquant.demo import language_model as demo

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from run_in_llama_cpp import LlamaCpp, embedded_llama, write_gguf

MEGABYTE = 10**6


@dataclass
class Candidate:
    """A model in a runtime.

    Attributes:
        run: gives logits [tokens, vocabulary] of `tokens` [tokens].
        megabytes: of its file.
        reference: the graph with the same weights, if there is one.
    """

    run: Callable[[Tensor], Tensor]
    megabytes: float
    reference: Callable[[Tensor], Tensor] | None = None


def in_torch(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """A Llama of transformers, or its graph."""
    return lambda tokens: model(input_ids=tokens[None])["logits"][0]


def of_llama_cpp(base: Path, path: Path) -> Path:
    """The file that llama.cpp's quantizer makes of the float one; embedding and head stay float."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread = torch.get_num_threads()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    options.token_embedding_type = options.output_tensor_type = llama_cpp.GGML_TYPE_F32
    status = llama_cpp.llama_model_quantize(bytes(base), bytes(path), options)
    if status != 0:
        raise RuntimeError(f"llama.cpp's quantizer failed with status {status}")
    return path


def candidates(folder: Path) -> dict[str, Candidate]:
    """Every model and runtime by its name; files are made in `folder`."""
    model, base = embedded_llama(), folder / "float.gguf"
    write_gguf(model, base)
    threads = torch.get_num_threads()

    def in_llama_cpp(path: Path, reference: Any = None) -> Candidate:
        size = path.stat().st_size / MEGABYTE
        return Candidate(LlamaCpp(path, threads).logits, size, reference)

    size = sum(p.nbytes for p in model.parameters()) / MEGABYTE
    found = {
        "float32 in torch": Candidate(in_torch(model), size),
        "float32 in llama.cpp": in_llama_cpp(base, in_torch(model)),
        "llama.cpp's Q4_0 in llama.cpp": in_llama_cpp(of_llama_cpp(base, folder / "theirs.gguf")),
    }
    text = [{"input_ids": rows} for rows in demo.calibration_tokens()[::6].split(16)]
    options: dict[str, Any] = {"target": "gguf", "group_size": 32, "accuracy_warning": "ignore"}
    for name, data, method in (("without data", None, "auto"), ("gptq", text, "gptq")):
        graph, _ = fxquant.quantize(model, data, method=method, example_inputs=text[0], **options)
        path = folder / "ours.safetensors"
        fxquant.save_model(graph, path)
        run = in_torch(graph)
        found[f"fxquant, {name}"] = Candidate(run, path.stat().st_size / MEGABYTE, run)
        path = folder / f"{method}.gguf"
        fxquant.export(graph, path, format="gguf", base=base)
        found[f"fxquant's GGUF, {name}, in llama.cpp"] = in_llama_cpp(path, run)
    return found


def perplexity(logits: Tensor, windows: Tensor) -> float:
    """Of `windows` [windows, length], whose logits are [windows, length, vocabulary]."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()
    )
    return float(losses.exp())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--windows", type=int, default=16, help="of 256 bytes, for accuracy")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    heldout = demo.heldout_tokens()
    windows = heldout[:: len(heldout) // arguments.windows][: arguments.windows]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        made = candidates(Path(folder))
        turns = {name: lambda c=c: c.run(windows[0]) for name, c in made.items()}
        seconds = median_seconds(turns, arguments.rounds, clock=fair_clock())
        expected = torch.stack([made["float32 in torch"].run(row) for row in windows])
        rows = []
        for name, candidate in made.items():
            logits = torch.stack([candidate.run(row) for row in windows])
            same = candidate.reference and torch.stack([candidate.reference(r) for r in windows])
            rows.append({
                "": name,
                "perplexity": perplexity(logits, windows),
                "to float dB": fxquant.sqnr_db(expected, logits),
                "to ours dB": None if same is None else fxquant.sqnr_db(same, logits),
                "bytes/s": windows.shape[1] / seconds[name],
                "MB": candidate.megabytes,
            })  # fmt: skip
    title = f"The embedded Llama, {torch.get_num_threads()} threads"
    report(title, rows, arguments.json)


if __name__ == "__main__":
    main()
