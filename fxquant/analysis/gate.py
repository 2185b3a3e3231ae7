"""An accuracy gate: does a saved model, or a report, meet its thresholds?"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant.errors import OptionError


@dataclass(frozen=True)
class Failure:
    """A figure below its threshold."""

    module: str
    sqnr_db: float
    needed_db: float
    why: str

    def __str__(self) -> str:
        return f"{self.module}: {self.sqnr_db:.2f} dB, needs {self.needed_db:.2f} dB ({self.why})"


def check_report(
    report: dict[str, Any],
    *,
    min_sqnr_db: float | None = None,
    max_drop_db: float | None = None,
    baseline: dict[str, Any] | None = None,
) -> list[Failure]:
    """Compare a report's figures with thresholds and with an older report.

    Args:
        report: what `SensitivityReport.to_json` or `QuantizationInfo.to_dict` gives.
        min_sqnr_db: the least output SQNR.
        max_drop_db: how much the output or a node may fall below the baseline.
        baseline: an older report.

    Returns:
        The figures below their threshold; none if all thresholds are met.

    Raises:
        OptionError: there is no threshold, or a report lacks the figures to compare or they are no
            numbers: a gate that compares nothing would always pass.
    """
    for name, threshold in (("--min-sqnr", min_sqnr_db), ("--max-drop", max_drop_db)):
        if threshold is not None and not math.isfinite(threshold):
            raise _wrong(
                "check", f"{name} {threshold}", "a number of decibels", "Pass a finite number."
            )
    if max_drop_db is not None and max_drop_db < 0:
        raise _wrong("check", f"--max-drop {max_drop_db:g}", "0 dB or more", "Drop the sign.")
    if min_sqnr_db is None and max_drop_db is None:
        raise _wrong(
            "check",
            "no threshold",
            "at least one",
            "Pass --min-sqnr, or --max-drop with --baseline.",
        )
    if (max_drop_db is None) != (baseline is None):
        raise _wrong(
            "check", "only one of both", "a baseline and a largest drop", "Pass both or neither."
        )
    failures = []
    output = _output(report)
    if min_sqnr_db is not None and not output >= min_sqnr_db:
        failures.append(Failure("model output", output, min_sqnr_db, "least SQNR"))
    if max_drop_db is None or baseline is None:
        return failures
    old = {**_rows(baseline), "model output": _output(baseline)}
    new = {**_rows(report), "model output": output}
    missing = sorted(set(old) - set(new))
    if missing:
        raise _wrong("check", f"no figure for {missing[0]}", "all nodes of the baseline",
                     "Make both reports from the same model.")  # fmt: skip
    for module, before in old.items():
        if not new[module] >= before - max_drop_db:
            why = f"baseline {before:.2f} dB, drop at most {max_drop_db:g}"
            failures.append(Failure(module, new[module], before - max_drop_db, why))
    return failures


def read_report(path: str | Path) -> dict[str, Any]:
    """A report from a JSON file.

    Raises:
        OptionError: the file is missing or no report.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _wrong(str(path), str(error), "a JSON report", "Write one with --json.") from error
    if not isinstance(data, dict) or "rows" not in data:
        raise _wrong(
            str(path), "JSON without rows", "a report of fxquant", "Write one with --json."
        )
    return data


def _rows(report: dict[str, Any]) -> dict[str, float]:
    found = {
        row["module"]: _number(row["introduced_sqnr_db"], row["module"])
        for row in report["rows"]
        if row.get("introduced_sqnr_db") is not None
    }
    if not found:
        raise _wrong("report", "no figure of any layer", "a report of a quantized model",
                     "Make it from a model in which layers are quantized, with data.")  # fmt: skip
    return found


def _output(report: dict[str, Any]) -> float:
    value = report.get("output_sqnr_db", report.get("sqnr_db"))
    if value is None:
        raise _wrong(
            "report", "no output SQNR", "a report made with data", "Pass calibration data."
        )
    return _number(value, "model output")


def _number(value: Any, where: str) -> float:
    if value in ("inf", "-inf"):  # as JSON has it
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise _wrong(
            "report", f"{value!r} as the SQNR of {where}", "a number of decibels",
            "Look for NaN in the model's outputs or in the data, and make the report again.",
        )  # fmt: skip
    return float(value)


def _wrong(where: str, found: str, needed: str, remedy: str) -> OptionError:
    return OptionError(where, found=found, needed=needed, remedy=remedy)
