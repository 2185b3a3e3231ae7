"""What each method keeps of two real models, on other parts of the text it saw and on other texts.

    OMP_WAIT_POLICY=passive python benchmarks/accuracy.py
    OMP_WAIT_POLICY=passive python benchmarks/accuracy.py --model minilm --method best awq

- The embedded language model: the share of plain symmetric rounding's divergence from float (16
  levels, full range, no clip search) that a method takes away, as `gap closed`.
- all-MiniLM-L6-v2 (the extra `minilm`): SQNR of the mean-pooled embedding. The pooler stays float.

Calibration takes text of one book. `same book` is other text of it; `worst` and `mean` are over the
columns behind them, text that calibration did not resemble (see `sources.py`). INT4 with group size
128 unless a row says otherwise. Other libraries take part if they are installed, see
`quantizer_peers.py`; those that take data are given the same.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from quantizer_peers import installed_peers, missing_peers
from subjects import SUBJECTS, Subject, plain_rounding, subject_parser
from timing import report
from torch import nn

import fxquant

MANY = 10_000  # samples: more than there are
W8A8 = {"bits": 8, "activation_bits": 8}

# The options of `static_quantize` by the name of a row.
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "rtn, asymmetric": {"method": "rtn", "symmetric": False},
    "rtn, nf4": {"method": "rtn", "code_book": "nf4"},
    "hqq": {"method": "hqq"},
    "awq": {"method": "awq"},
    "smoothquant": {"method": "smoothquant"},
    "gptq": {"method": "gptq"},
    "gptq, asymmetric": {"method": "gptq", "symmetric": False},
    "gptq, nf4": {"method": "gptq", "code_book": "nf4"},
    "awq+gptq": {"method": "awq+gptq"},
    "best": {"method": "best"},
    "best, asymmetric": {"method": "best", "symmetric": False},
    "best, nf4": {"method": "best", "code_book": "nf4"},
    "W4A8 best, static": {"method": "best", "activation_bits": 8, "observer": "histogram"},
    "W4A8 best, dynamic": {"method": "best", "activation_bits": 8, "observer": "dynamic"},
    "W8A8 static": {"method": "rtn", "observer": "histogram", **W8A8},
    "W8A8 static, smoothquant": {"method": "smoothquant", "observer": "histogram", **W8A8},
    "W8A8 dynamic": {"method": "rtn", "observer": "dynamic", **W8A8},
}
DATA_FREE: dict[str, dict[str, Any]] = {
    "no data: rtn": {"method": "rtn"},
    "no data: rtn, asymmetric": {"method": "rtn", "symmetric": False},
    "no data: rtn, nf4": {"method": "rtn", "code_book": "nf4"},
    "no data: hqq, nf4": {"method": "hqq", "code_book": "nf4"},
    "no data: hqq, asymmetric": {"method": "hqq", "symmetric": False},
}
# With the text that fxquant ships: in place of the book, or behind it.
BUILT_IN: dict[str, dict[str, Any]] = {
    "built-in text: gptq, asymmetric": {"method": "gptq", "symmetric": False},
    "built-in text: best, asymmetric": {"method": "best", "symmetric": False},
    "built-in text: best, nf4": {"method": "best", "code_book": "nf4"},
}
BOTH: dict[str, dict[str, Any]] = {
    "book and built-in text: gptq, asymmetric": {"method": "gptq", "symmetric": False},
    "book and built-in text: best, asymmetric": {"method": "best", "symmetric": False},
    "book and built-in text: best, nf4": {"method": "best", "code_book": "nf4"},
}
# The text that fxquant ships, without the languages that are measured on.
OTHER_LANGUAGES: dict[str, dict[str, Any]] = {
    "built-in text without these languages: gptq, asymmetric": {
        "method": "gptq", "symmetric": False,
    },
}  # fmt: skip
# The book, and copies of some of its batches with half of the tokens drawn at random.
NOISY: dict[str, dict[str, Any]] = {
    "token noise: gptq, asymmetric": {"method": "gptq", "symmetric": False, "token_noise": 0.5},
    "token noise: best, asymmetric": {"method": "best", "symmetric": False, "token_noise": 0.5},
}
PLAIN = "plain rounding"


def static(subject: Subject, options: dict[str, Any]) -> nn.Module:
    """`static_quantize`."""
    kept = subject.keep if isinstance(options.get("bits", 4), int) else None
    return fxquant.static_quantize(
        subject.graph,
        subject.calibration,
        num_calibration_samples=subject.samples,
        modules_to_not_convert=kept,
        accuracy_warning="ignore",
        **options,
    )[0]


def data_free(subject: Subject, options: dict[str, Any]) -> nn.Module:
    """`quantize`."""
    return fxquant.quantize(
        subject.graph,
        modules_to_not_convert=subject.keep,
        accuracy_warning="ignore",
        **options,
    )[0]


def candidates(subject: Subject) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """What makes each row, by its name; plain rounding first."""
    yield PLAIN, lambda: plain_rounding(subject.graph, subject.keep)
    for name, options in DATA_FREE.items():
        yield name, lambda options=options: data_free(subject, options)
    for name, options in (METHODS | NOISY).items():
        yield name, lambda options=options: static(subject, options)
    only = replace(subject, calibration=subject.built_in, samples=MANY)
    for name, options in BUILT_IN.items():
        yield name, lambda options=options: static(only, options)
    without = replace(only, calibration=subject.other_languages)
    for name, options in OTHER_LANGUAGES.items():
        yield name, lambda options=options: static(without, options)
    both = replace(only, calibration=[*subject.calibration, *subject.built_in])
    for name, options in BOTH.items():
        yield name, lambda options=options: static(both, options)
    for name, make in installed_peers(subject.model).items():
        yield name, lambda m=make: m(subject.model, subject.quantized, subject.calibration)


def main() -> None:
    """Print the tables."""
    parser = subject_parser(__doc__)
    parser.add_argument("--method", nargs="*", help="rows of the table; all of them by default")
    arguments = parser.parse_args()

    table: list[dict[str, Any]] = []
    for name in arguments.model:
        subject = SUBJECTS[name](arguments.pieces)
        rows: list[dict[str, Any]] = []
        for method, make in candidates(subject):
            if arguments.method and method not in (PLAIN, *arguments.method):
                continue
            began = time.perf_counter()
            model = make()
            seconds = time.perf_counter() - began
            rows.append({"method": method, **subject.row(model), "seconds": seconds})
        data = f"{subject.samples} pieces of one book, {subject.tokens} tokens"
        report(f"{name}, INT4 group 128, {subject.figure}; calibrated on {data}", rows, None)
        table += [{"model": name, **row} for row in rows]
    if missing_peers():
        print(f"\nnot installed: {', '.join(missing_peers())}")
    if arguments.json is not None:
        report("both", table, arguments.json)


if __name__ == "__main__":
    main()
