"""Texts of several registers and languages, to measure on what calibration did not resemble.

Calibration takes one book; figures are measured on other parts of that book and on the sources
below. All of them come with this repository or with Python: `texts/README.md` says from where.
"""

import ast
import inspect
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

import fxquant
from fxquant.demo.language_model import CONTEXT, calibration_tokens, heldout_tokens
from fxquant.texts.calibration_text import REGISTERS

T = TypeVar("T")

TEXTS = Path(__file__).parent / "texts"
# The excerpts that fxquant ships begin with windows of one book, the King James Bible.
BOOK_CALIBRATION = slice(0, 260)
BOOK_HELDOUT = slice(0, 268)
MEASURED_MODULES = ("argparse", "ast", "collections", "heapq", "tarfile")  # their source code
MEASURED_LANGUAGES = ("chinese", "german", "spanish", "russian")
SHORTEST, LONGEST = 30, 300  # characters of a piece


@dataclass(frozen=True)
class Source:
    """A text.

    Attributes:
        name: of its register or language.
        text: reads it.
        separator: what stands between the pieces that an encoder is given.
    """

    name: str
    text: Callable[[], str]
    separator: str = ". "

    def pieces(self, count: int) -> list[str]:
        """At most `count` sentences, blocks or paragraphs, evenly spaced, on one line each."""
        text = self.text()
        if self.separator.strip():  # sentences go on over the ends of lines
            text = " ".join(text.split())
        found = [" ".join(piece.split()) for piece in text.split(self.separator)]
        return _spread([p for p in found if SHORTEST < len(p) < LONGEST], count)

    def windows(self, count: int) -> Tensor:
        """At most `count` windows of bytes, evenly spaced, [windows, `CONTEXT`]."""
        tokens = torch.frombuffer(bytearray(self.text().encode()), dtype=torch.uint8).long()
        windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        return torch.stack(_spread(list(windows), count))


def other_sources() -> list[Source]:
    """Everything but the book."""
    return [
        Source("dictionaries", _dictionaries),
        Source("documentation", _documentation),
        Source("speeches", lambda: _file("speeches")),
        Source("source code", _source_code, "\n\n"),
        Source("languages", lambda: _file("languages"), "\n"),
    ]


def book_for_calibration() -> Source:
    """The parts of the book that calibration is given."""
    return Source("book", lambda: _decoded(calibration_tokens()[BOOK_CALIBRATION]))


def book_held_out() -> Source:
    """Other parts of it."""
    return Source("same book", lambda: _decoded(heldout_tokens()[BOOK_HELDOUT]))


def built_in_text(count: int | None = None, *, without: Collection[str] = ()) -> Source:
    """What `fxquant.calibration_text` has for those without data.

    Args:
        count: of passages; all of them by default.
        without: registers that are left out.
    """
    registers = [name for name in REGISTERS if name not in without]
    text = "\n\n".join(fxquant.calibration_text(count, registers))
    return Source("built-in text", lambda: text, "\n\n")


def library() -> Source:
    """Docstrings of Python's library, but of the modules whose code is measured on."""
    return Source("library", _docstrings, "\n\n")


def _dictionaries() -> str:
    """The Devil's Dictionary and the Jargon File, from the excerpt that is held out."""
    return _decoded(heldout_tokens()[BOOK_HELDOUT.stop :])


def _documentation() -> str:
    """Python's language reference, as `help` has it."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _source_code() -> str:
    return "\n\n".join(inspect.getsource(import_module(name)) for name in MEASURED_MODULES)


@cache
def _docstrings() -> str:
    """Of all modules, classes and functions in the files beside `os`."""
    found = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        if path.stem not in MEASURED_MODULES:
            for part in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(part, ast.Module | ast.ClassDef | ast.FunctionDef):
                    found.append(ast.get_docstring(part) or "")
    return "\n\n".join(found)


def _file(name: str) -> str:
    return (TEXTS / f"{name}.txt").read_text("utf-8")


def _decoded(tokens: Tensor) -> str:
    return bytes(tokens.flatten().tolist()).decode("utf-8", "replace")


def _spread(items: list[T], count: int) -> list[T]:
    """`count` of the items, evenly spaced; all of them where they are fewer."""
    step = max(len(items) / count, 1.0)
    return [items[int(i * step)] for i in range(min(count, len(items)))]
