"""How far a long step is: a bar with the time that is left, on a terminal."""

import sys
from collections.abc import Iterable, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def is_shown(progress: bool | None) -> bool:
    """What a caller's `progress=` means: by default, bars show on a terminal only."""
    return sys.stderr.isatty() if progress is None else progress


def steps(
    items: Iterable[T], title: str, *, total: int | None = None, progress: bool | None = None
) -> Iterable[T]:
    """The items, while a bar shows how many have been done and how long the rest will take.

    Args:
        items: what to go through.
        title: what is done with each item.
        total: how many there are; by default their number, if they have one.
        progress: show the bar; by default on a terminal only.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    return tqdm(items, title, total, disable=not is_shown(progress))
