"""Text for people or JSON for machines, and exit statuses."""

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import click

from fxquant.errors import AccuracyError, FxquantError, OptionError
from fxquant.report.tables import to_json

CHECK_FAILED = 1
WRONG_USE = 2
# Unicode's categories of characters that a terminal obeys and a reader does not see.
ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    r"""The text with control characters spelled out.

    Names come from files and models of others, and a terminal would obey some of their characters.

    >>> printable("fc\x1b[2J")
    'fc\\x1b[2J'
    """
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ESCAPED else repr(c)[1:-1] for c in text
    )


class UserCodeError(OptionError):
    """A function that the command line names raised; `trace` is its traceback."""

    trace = ""


class Output:
    """Where a command writes: with `as_json`, only `result` reaches standard output.

    Args:
        as_json: whether a program reads it.
        is_muted: whether another process of the run says the same; errors are printed by all.
    """

    def __init__(self, as_json: bool, *, is_muted: bool = False) -> None:
        self.as_json, self.is_muted = as_json, is_muted
        self.stdout = sys.stdout

    def text(self, line: object = "") -> None:
        """A line for people."""
        if not self.is_muted:
            click.echo(printable(str(line)), err=self.as_json)

    def title(self, line: str) -> None:
        """A heading for people."""
        text = printable(f"\n{line}")
        if self.is_muted:
            return
        click.echo(text if self.as_json else click.style(text, bold=True), err=self.as_json)

    def result(self, data: Any) -> None:
        """The machine-readable result."""
        if self.as_json and not self.is_muted:
            click.echo(to_json(data), file=self.stdout)

    @contextmanager
    def running(self) -> Iterator["Output"]:
        """Run a command: errors become a message and a status, 1 a check failed, 2 wrong use.

        With `as_json`, what the user's code prints goes to standard error.
        """
        self.stdout = sys.stdout
        try:
            with redirect_stdout(sys.stderr if self.as_json else sys.stdout):
                yield self
        except AccuracyError as error:
            click.echo(printable(f"fxquant: {error}"), err=True)
            raise SystemExit(CHECK_FAILED) from error
        except FxquantError as error:
            if isinstance(error, UserCodeError):
                click.echo(printable(error.trace), err=True)
            click.echo(printable(f"fxquant: {error}"), err=True)
            raise SystemExit(WRONG_USE) from error
