"""How many tokens of calibration are enough: accuracy against their number.

    OMP_WAIT_POLICY=passive python benchmarks/calibration_size.py
    OMP_WAIT_POLICY=passive python benchmarks/calibration_size.py --model minilm --tokens 1000 10000
    OMP_WAIT_POLICY=passive python benchmarks/calibration_size.py --tokens 1500 --method rtn best

Calibration mixes three sources in equal parts as far as they reach: a book, the text that fxquant
ships, and docstrings of Python's library. Figures and columns are those of `accuracy.py`: `same
book` and the five sources that calibration did not take.
"""

import time
from itertools import product
from typing import Any

from sources import book_for_calibration, built_in_text, library
from subjects import SUBJECTS, Subject, subject_parser, token_count
from timing import report

import fxquant

MANY = 10**6  # samples: more than there are
TOKENS = (1_000, 3_000, 10_000, 30_000, 100_000, 200_000)
SOURCES = (book_for_calibration(), built_in_text(), library())


def mixture(subject: Subject, tokens: int) -> list[Any]:
    """Batches of about so many tokens; what the first sources lack, the last one gives."""
    batches: list[Any] = []
    for left, source in zip((3, 2, 1), SOURCES, strict=True):
        wanted = (tokens - token_count(batches)) // left
        per_piece = token_count(subject.batches(source, 64)) / 64
        batches += subject.batches(source, max(1, round(wanted / per_piece)))
    return batches


def main() -> None:
    """Print the tables."""
    parser = subject_parser(__doc__)
    parser.add_argument("--method", nargs="*", default=["gptq"])
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    arguments = parser.parse_args()

    table: list[dict[str, Any]] = []
    for name in arguments.model:
        subject = SUBJECTS[name](arguments.pieces)
        rows: list[dict[str, Any]] = []
        for tokens, method in product(arguments.tokens, arguments.method):
            batches = mixture(subject, tokens)
            began = time.process_time()
            model = fxquant.static_quantize(
                subject.graph,
                batches,
                method=method,
                symmetric=False,
                num_calibration_samples=MANY,
                modules_to_not_convert=subject.keep,
                accuracy_warning="ignore",
            )[0]
            seconds = time.process_time() - began
            row = {"tokens": token_count(batches), "method": method, **subject.row(model)}
            rows.append({**row, "CPU seconds": seconds})
        report(f"{name}, asymmetric, {subject.figure}", rows, None)
        table += [{"model": name, **row} for row in rows]
    if arguments.json is not None:
        report("both", table, arguments.json)


if __name__ == "__main__":
    main()
