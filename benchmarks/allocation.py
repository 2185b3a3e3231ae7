"""What `allocate` gains over one width for all layers, at the same average width.

    OMP_WAIT_POLICY=passive python benchmarks/allocation.py
    OMP_WAIT_POLICY=passive python benchmarks/allocation.py --model minilm --average 4
    OMP_WAIT_POLICY=passive python benchmarks/allocation.py --model minilm --embeddings 8

`quantize(average_bits=...)` measures each layer at 2 to 8 bits, quantizes with the mix of widths
that `allocate` finds and with one width for all layers, and keeps what is better on rows that chose
no integer. With `--embeddings` nothing is allocated: 4 bits are compared with 4 bits and embeddings
of that width, by `best`. The texts are those of `accuracy.py`; the figure of MiniLM is the SQNR of
its mean-pooled embedding, that of the language model its perplexity on other parts of the book.
"""

import time
from collections import Counter
from typing import Any

from accuracy import static
from sources import book_held_out
from subjects import SUBJECTS, Subject, subject_parser
from timing import report
from torch import nn

import fxquant
from fxquant.demo.measure import perplexity
from fxquant.measure.sizes import MEGABYTE, model_bytes


def figures(name: str, subject: Subject, model: nn.Module, pieces: int) -> dict[str, float]:
    """What a row of the table says of a model."""
    size = {"MB": model_bytes(model) / MEGABYTE}
    if name == "language model":
        windows = book_held_out().windows(pieces)
        return {**size, "perplexity": perplexity(model, windows)}
    found = subject.row(model)
    return size | {column: found[column] for column in ("same book", "worst", "mean")}


def rows_of(name: str, averages: list[int], method: str, pieces: int) -> list[dict[str, Any]]:
    """The table of one model."""
    subject = SUBJECTS[name](pieces)
    rows: list[dict[str, Any]] = []
    if name == "language model":
        rows.append({"widths": "float", **figures(name, subject, subject.graph, pieces)})
    for average in averages:
        model = static(subject, {"method": method, "bits": average})
        rows.append({"widths": f"{average} everywhere", **figures(name, subject, model, pieces)})
        began = time.perf_counter()
        model, info = fxquant.quantize(
            subject.graph,
            subject.calibration,
            method=method,
            average_bits=average,
            num_calibration_samples=subject.samples,
            modules_to_not_convert=subject.keep,
            accuracy_warning="ignore",
        )
        seconds = time.perf_counter() - began
        widths = Counter(d.bits for d in info.decisions if d.bits is not None)
        words = ", ".join(f"{widths[bits]} of {bits} bits" for bits in sorted(widths))
        print(f"{name}, {average} bits on average, {seconds:.0f} s: {words}", flush=True)
        rows.append({"widths": f"{average} on average", **figures(name, subject, model, pieces)})
        print(*rows[-2:], sep="\n", flush=True)  # the whole table takes long
    return rows


def rows_with_embeddings(name: str, embeddings: int, pieces: int) -> list[dict[str, Any]]:
    """The table of one model with embeddings in float and in integers."""
    subject = SUBJECTS[name](pieces)
    rows = []
    for widths, bits in (
        ("4, embeddings float", None),
        (f"4, embeddings {embeddings}", embeddings),
    ):
        model = static(subject, {"method": "best", "embeddings": bits})
        rows.append({"widths": widths, **figures(name, subject, model, pieces)})
    return rows


def main() -> None:
    """Print the tables."""
    parser = subject_parser(__doc__)
    parser.add_argument("--average", nargs="*", type=int, default=[4, 3])
    parser.add_argument("--method", default="gptq", choices=("rtn", "gptq", "best"))
    parser.add_argument("--embeddings", type=int)
    arguments = parser.parse_args()
    table: list[dict[str, Any]] = []
    for name in arguments.model:
        if arguments.embeddings is not None:
            rows = rows_with_embeddings(name, arguments.embeddings, arguments.pieces)
        else:
            rows = rows_of(name, arguments.average, arguments.method, arguments.pieces)
        report(f"{name}, group 128", rows, None)
        table += [{"model": name, **row} for row in rows]
    if arguments.json is not None:
        report("both", table, arguments.json)


if __name__ == "__main__":
    main()
