"""What a run will take: memory, disk and time, as plain values with what they assume."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

NO_DATA = "what calibration and measuring take: pass data"
NO_SHAPES = "what values between layers take: the model's code asks for values of tensors"
NO_EXAMPLE = "what tracing takes: pass data or example_inputs"
NO_SEARCH = "the search of channel scales"
GIGABYTE, MEGABYTE, MINUTE, HOUR = 10**9, 10**6, 60, 3600


@dataclass(frozen=True)
class Step:
    """A part of a run.

    Attributes:
        name: what is done.
        seconds: that one process needs for it.
        processes: the most that can share it.
    """

    name: str
    seconds: float
    processes: int = 1


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        memory_bytes: the peak of the process, beside the model and the data.
        waiting_bytes: of values that wait between layers, in memory or in the file.
        spilled_bytes: of these, what waits in a temporary file, since `memory` does not hold it.
        output_bytes: of the quantized model in a file.
        steps: in their order.
        unknown: what could not be predicted, in words; the figures are without it.
    """

    memory_bytes: int
    waiting_bytes: int
    spilled_bytes: int
    output_bytes: int
    steps: Sequence[Step]
    unknown: Sequence[str] = ()

    @property
    def seconds(self) -> float:
        """Of one process with as many threads as torch has now."""
        return self.seconds_on(1)

    def seconds_on(self, processes: int) -> float:
        """Of processes that share the work, if each is as fast as one alone."""
        return sum(step.seconds / min(processes, step.processes) for step in self.steps)

    def lines(self) -> list[str]:
        """A few lines to read."""
        steps = ", ".join(f"{step.name} {format_seconds(step.seconds)}" for step in self.steps)
        waiting = format_bytes(self.waiting_bytes)
        return [
            f"memory  about {format_bytes(self.memory_bytes)} beside the model and the data",
            f"disk    {format_bytes(self.output_bytes)} for the quantized model, "
            f"{format_bytes(self.spilled_bytes)} for values that wait ({waiting} in all)",
            f"time    about {format_seconds(self.seconds)} on this machine: {steps}",
            *(f"        not predicted: {text}" for text in self.unknown),
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "seconds": self.seconds}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Forecast":
        """Undo `to_dict`."""
        values = {key: value for key, value in data.items() if key != "seconds"}
        return cls(**{**values, "steps": [Step(**step) for step in data["steps"]]})


def format_bytes(count: float) -> str:
    """Bytes for people.

    >>> format_bytes(1_234_000_000), format_bytes(56_700_000), format_bytes(1200)
    ('1.23 GB', '57 MB', '0.0 MB')
    """
    if count >= GIGABYTE:
        return f"{count / GIGABYTE:.2f} GB"
    return f"{count / MEGABYTE:.0f} MB" if count >= 10 * MEGABYTE else f"{count / MEGABYTE:.1f} MB"


def format_seconds(seconds: float) -> str:
    """Seconds for people.

    >>> format_seconds(0.03), format_seconds(42.4), format_seconds(600), format_seconds(9000)
    ('0.0 s', '42 s', '10 min', '2.5 h')
    """
    if seconds >= HOUR:
        return f"{seconds / HOUR:.1f} h"
    if seconds >= 2 * MINUTE:
        return f"{seconds / MINUTE:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
