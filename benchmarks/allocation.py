"""What `allocate` gains over one width for all layers, at the same average width.

    OMP_WAIT_POLICY=passive python benchmarks/allocation.py
    OMP_WAIT_POLICY=passive python benchmarks/allocation.py --model minilm --average 4
    OMP_WAIT_POLICY=passive python benchmarks/allocation.py --model minilm --embeddings 8

Each layer is measured at 2 to 8 bits once (`sensitivity`, method gradient, layers made by gptq);
then the model is quantized by `best` with the widths that `allocate` chose. With `--embeddings`
nothing is allocated: 4 bits are compared with 4 bits and embeddings of that width. The texts are
those of `accuracy.py`; the figure of MiniLM is the SQNR of its mean-pooled embedding, that of the
language model its perplexity on other parts of the book.
"""

import time
from typing import Any

from accuracy import static
from sources import book_held_out
from subjects import SUBJECTS, Subject, subject_parser
from timing import report
from torch import nn

import fxquant
from fxquant.demo.measure import perplexity
from fxquant.measure.sizes import MEGABYTE, model_bytes

METRICS = {"language model": "kl", "minilm": "sqnr"}


def figures(name: str, subject: Subject, model: nn.Module, pieces: int) -> dict[str, float]:
    """What a row of the table says of a model."""
    size = {"MB": model_bytes(model) / MEGABYTE}
    if name == "language model":
        windows = book_held_out().windows(pieces)
        return {**size, "perplexity": perplexity(model, windows)}
    found = subject.row(model)
    return size | {column: found[column] for column in ("same book", "worst", "mean")}


def measured(name: str, subject: Subject) -> fxquant.SensitivityReport:
    """Each layer at each width."""
    return fxquant.sensitivity(
        subject.graph,
        subject.calibration,
        method="gradient",
        rounding="gptq",
        metric=METRICS[name],
        num_samples=subject.samples,
        modules_to_not_convert=subject.keep,
    )


def rows_of(name: str, averages: list[int], pieces: int) -> list[dict[str, Any]]:
    """The table of one model."""
    subject = SUBJECTS[name](pieces)
    rows: list[dict[str, Any]] = []
    if name == "language model":
        rows.append({"widths": "float", **figures(name, subject, subject.graph, pieces)})
    began = time.perf_counter()
    found = measured(name, subject)
    seconds = time.perf_counter() - began
    print(f"{name}: measured in {seconds:.0f} s", flush=True)
    for average in averages:
        plan = fxquant.allocate(found, average_bits=average)
        counts = {b: list(plan.values()).count(b) for b in sorted(set(plan.values()))}
        words = ", ".join(f"{count} of {bits} bits" for bits, count in counts.items())
        print(f"{name}, {average} bits on average: {words}", flush=True)
        for widths, bits in ((f"{average} everywhere", average), (f"{average} on average", plan)):
            model = static(subject, {"method": "best", "bits": bits})
            rows.append({"widths": widths, **figures(name, subject, model, pieces)})
            print(rows[-1], flush=True)  # the whole table takes long
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
    parser.add_argument("--embeddings", type=int)
    arguments = parser.parse_args()
    table: list[dict[str, Any]] = []
    for name in arguments.model:
        if arguments.embeddings is not None:
            rows = rows_with_embeddings(name, arguments.embeddings, arguments.pieces)
        else:
            rows = rows_of(name, arguments.average, arguments.pieces)
        report(f"{name}, group 128, best", rows, None)
        table += [{"model": name, **row} for row in rows]
    if arguments.json is not None:
        report("both", table, arguments.json)


if __name__ == "__main__":
    main()
