"""Where a forward asks for a truth, and whether the other answer would only raise."""

import ast
import linecache
import os
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

_TOOLS = ("torch", "sympy", "fxquant")


@dataclass(frozen=True)
class Place:
    """A line of code: its file and its number, from 1."""

    path: str
    number: int

    def __str__(self) -> str:
        code = linecache.getline(self.path, self.number).strip()
        return f"line {self.number} of {os.path.basename(self.path)}: {code}"


def is_tool(frame: Any) -> bool:
    """Whether a frame runs torch's code, or ours."""
    return str(frame.f_globals.get("__name__", "")).split(".")[0] in _TOOLS


def user_place() -> Place:
    """The line of the innermost frame that runs the user's code, or a library's of models."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and is_tool(frame):
        frame = frame.f_back
    return Place(frame.f_code.co_filename, frame.f_lineno)


def only_raises(place: Place) -> bool:
    """Whether the statement there is a check: one answer goes on, the other raises.

    That is `assert ...` and `if ...: raise ...`. Of several conditions each must decide alone:
    after `if a and b` the answer to `a` says nothing.
    """
    for statement in _statements("".join(linecache.getlines(place.path))):
        if not statement.lineno <= place.number <= (statement.test.end_lineno or 0):
            continue
        joined = ast.Or if isinstance(statement, ast.Assert) else ast.And
        if any(isinstance(n, joined | ast.IfExp) for n in ast.walk(statement.test)):
            return False
        return isinstance(statement, ast.Assert) or isinstance(statement.body[-1], ast.Raise)
    return False


@cache
def _statements(source: str) -> list[ast.If | ast.Assert]:
    """The statements of a file that ask for a truth."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    return [n for n in ast.walk(tree) if isinstance(n, ast.If | ast.Assert)]
