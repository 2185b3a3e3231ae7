"""Memory that was freed, given back to the system while a run goes on.

A C library keeps what is freed, for what is asked for next. Where values that last lie between
values that come and go, the gaps between them fit nothing any more, and a process grows to several
times of what it holds. The library of Linux gives such pages back when it is asked to; nothing else
changes in the process, and what is in use stays where it is.
"""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

MOST_GROWN = 100_000_000  # bytes by which the process may grow before it is asked
RESIDENT = Path("/proc/self/statm")  # pages, of which the second number are in memory


class FreedMemory:
    """Gives back what was freed, when the process has grown by `MOST_GROWN` bytes.

    Pages that are given back must be cleared by the system before they serve again, which costs
    more than asking: so they are kept as long as they are few.

    Args:
        bound: bytes of values that wait in memory; the process may grow by a quarter of it at most.
    """

    def __init__(self, bound: int | None = None) -> None:
        self._most = MOST_GROWN if bound is None else min(MOST_GROWN, bound // 4)
        self._least = resident_bytes() or 0

    def give_back(self) -> None:
        """Look at how large the process is, and give back what it does not use if that is much."""
        self._least = min(self._least, resident_bytes() or 0)
        if (resident_bytes() or 0) > self._least + self._most:
            give_back_freed()
            self._least = resident_bytes() or 0


def give_back_freed() -> None:
    """Give back all pages that nothing uses; nothing happens where the system's library cannot."""
    trim = _trim()
    if trim is not None:
        trim(0)


def resident_bytes() -> int | None:
    """How large the process is in memory; None where the system does not tell."""
    try:
        return int(RESIDENT.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


@cache
def _trim() -> Any:
    """`malloc_trim` of the GNU C library; None where there is another one."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
