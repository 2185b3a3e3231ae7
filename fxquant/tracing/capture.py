"""What every way of tracing gives: a recorded graph, or a reason in words."""

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph


@dataclass(frozen=True)
class Capture:
    """A graph as it was recorded, before it gets fxquant's form.

    Attributes:
        graph: its targets are paths in the module that was traced.
        objects: modules and tensors by these paths, where the traced module does not have them.
        opaque: the children that stayed opaque and why (path -> reason).
        guards: conditions on the inputs' sizes under which the graph is right.
        fixed: sizes of inputs that it may be right for only.
        left_out: outputs that a graph cannot hold.
        branches: places where the forward branches on values; the graph goes the example's way and
            refuses inputs that would go another.
        compared: whole numbers with which values are compared there.
        was_asked: whether the forward asked if it is being compiled, and was told that it is.
    """

    graph: Graph
    objects: dict[str, Any] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    guards: list[str] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)
    was_asked: bool = False


def describe_error(error: BaseException) -> str:
    """The error's class and first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def left_out(where: str, value: object) -> str:
    """What the report says of an output that a graph cannot hold."""
    return f"{where} is left out: a {type(value).__name__} cannot be in a graph"
