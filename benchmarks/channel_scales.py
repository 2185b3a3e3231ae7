"""What a channel scale of `awq` is worth to layers that are rounded alone, and to fitted ones.

    OMP_WAIT_POLICY=passive python benchmarks/channel_scales.py --pieces 2

`accuracy.py` shows that `awq+gptq` is no better than `gptq`. This prints why: of each layer whose
inputs `awq` scaled, the SQNR in dB of its output against the float layer on the same input
(`introduced_sqnr_db`), on the rows of calibration that chose no integer. The last two columns are
what the scale gains with either rounding.
"""

from typing import Any

from subjects import SUBJECTS, Subject, subject_parser
from timing import report

import fxquant

METHODS = ("rtn", "awq", "gptq", "awq+gptq")


def layers(subject: Subject, batches: list[Any]) -> list[dict[str, Any]]:
    """A row for each layer that a scale was folded for, and the mean of them."""
    records = {
        method: fxquant.static_quantize(
            subject.graph,
            batches,
            method=method,
            num_calibration_samples=subject.samples,
            modules_to_not_convert=subject.keep,
            accuracy_warning="ignore",
        )[1]
        for method in METHODS
    }
    found = {m: {r.module: r.introduced_sqnr_db for r in records[m].rows} for m in METHODS}
    scaled = [name for scale in records["awq"].folded_scales for name in scale.readers]
    rows: list[dict[str, Any]] = [{m: found[m][name] for m in METHODS} for name in scaled]
    rows.append({m: sum(row[m] for row in rows) / len(rows) for m in METHODS})
    return [
        {
            "layer": name,
            **row,
            "awq - rtn": row["awq"] - row["rtn"],
            "awq+gptq - gptq": row["awq+gptq"] - row["gptq"],
        }
        for name, row in zip([*scaled, "mean"], rows, strict=True)
    ]


def main() -> None:
    """Print the tables."""
    parser = subject_parser(__doc__)
    parser.add_argument("--batches", type=int, default=3, help="of the book, to calibrate on")
    arguments = parser.parse_args()

    table: list[dict[str, Any]] = []
    for name in arguments.model:
        subject = SUBJECTS[name](arguments.pieces)
        rows = layers(subject, subject.calibration[: arguments.batches])
        report(f"{name}, INT4 group 128, dB of a layer's output", rows, None)
        table += [{"model": name, **row} for row in rows]
    if arguments.json is not None:
        report("both", table, arguments.json)


if __name__ == "__main__":
    main()
