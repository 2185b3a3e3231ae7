"""What quantizing one layer costs: a row of the tables of records and reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SensitivityRow:
    """One quantizable node.

    Attributes:
        module: the qualified name in the user's model.
        kind: the module's class.
        shape: of the weight, [out, in].
        params: elements of all its parameters.
        bits: of a weight element.
        weight_sqnr_db: of the weight itself.
        introduced_sqnr_db: this node's own error, on the input it sees in the quantized model;
            None where it was not measured or the node did not run.
        cumulative_sqnr_db: all error that has arrived at its output.
        arrived_sqnr_db: the part of it that came with its input.
        output_sqnr_db: the model's output when only this node is quantized; None where the method
            does not measure it.
        output_errors: the output's error in the report's metric, by width; empty where the method
            does not measure it.
        saved_bytes: of the whole layer in a file, by the widths that it can have; 16: float. Empty
            where it was not asked for.
        shares_input: the same text for layers that read the same value or share a weight.
        shares_weight: the layer in front of this one whose weight it is, or nothing.
        input_low: the smallest input value, if it was observed.
        input_high: the largest.
        input_outlier_ratio: the largest magnitude divided by the rms.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    params: int
    bits: int
    weight_sqnr_db: float
    introduced_sqnr_db: float | None = None
    cumulative_sqnr_db: float | None = None
    arrived_sqnr_db: float | None = None
    output_sqnr_db: float | None = None
    output_errors: dict[int, float] = field(default_factory=dict)
    saved_bytes: dict[int, int] = field(default_factory=dict)
    shares_input: str = ""
    shares_weight: str = ""
    input_low: float | None = None
    input_high: float | None = None
    input_outlier_ratio: float | None = None

    def severity(self, warning_threshold: float, error_threshold: float) -> str:
        """`"critical"`, `"low"` or nothing, by the error this node introduces (or its weight's)."""
        measured = self.introduced_sqnr_db
        worst = self.weight_sqnr_db if measured is None else measured
        if not worst >= error_threshold:  # NaN is critical
            return "critical"
        return "" if worst >= warning_threshold else "low"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SensitivityRow":
        """The row of plain data, also after JSON."""
        values = {key: as_number(value) for key, value in data.items()}
        values["shape"] = tuple(data["shape"])
        for key in ("output_errors", "saved_bytes"):
            by_width = data.get(key, {}).items()
            values[key] = {int(bits): as_number(value) for bits, value in by_width}
        return cls(**values)


def as_number(value: Any) -> Any:
    """Undo JSON, which has no infinite numbers and no NaN: they are saved as text."""
    return float(value) if value in ("inf", "-inf", "nan") else value
