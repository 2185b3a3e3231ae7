"""Text for people or JSON for machines, and exit statuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from fxquant.errors import AccuracyError, FxquantError
from fxquant.report.tables import to_json

CHECK_FAILED = 1
WRONG_USE = 2


class Output:
    """Where a command writes: with `as_json`, only `result` reaches standard output."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def text(self, line: object = "") -> None:
        """A line for people."""
        click.echo(str(line), err=self.as_json)

    def title(self, line: str) -> None:
        """A heading for people."""
        self.text(click.style(f"\n{line}", bold=True) if not self.as_json else f"\n{line}")

    def result(self, data: Any) -> None:
        """The machine-readable result."""
        if self.as_json:
            click.echo(to_json(data))


@contextmanager
def exit_statuses() -> Iterator[None]:
    """Turn errors into a message and a status: 1 a check failed, 2 wrong use."""
    try:
        yield
    except AccuracyError as error:
        click.echo(f"fxquant: {error}", err=True)
        raise SystemExit(CHECK_FAILED) from error
    except FxquantError as error:
        click.echo(f"fxquant: {error}", err=True)
        raise SystemExit(WRONG_USE) from error
