"""How much memory a run may take beside the model: `"4GB"`, a number of bytes, or a share."""

import re
from pathlib import Path

from fxquant.errors import OptionError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SHARE_OF_FREE = 0.5
MEMORY_INFO = Path("/proc/meminfo")


def memory_bytes(memory: int | str | None) -> int | None:
    """The bound in bytes.

    Args:
        memory: `"4GB"`, `"400MB"`, or a number of bytes; None: half of what is free.

    Returns:
        Bytes; None where nothing is asked for and the system does not tell what is free.

    Raises:
        OptionError: the text is no amount, or the amount is not positive.
    """
    if memory is None:
        free = free_bytes()
        return None if free is None else int(free * SHARE_OF_FREE)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", str(memory), re.IGNORECASE)
    unit = "" if match is None else match[2].upper()
    amount = 0 if match is None else int(float(match[1]) * UNITS.get(unit.rstrip("B") + "B", 1))
    if isinstance(memory, bool) or amount < 1:
        raise OptionError(
            "memory",
            found=repr(memory),
            needed="an amount such as '4GB' or '400MB', or a number of bytes",
            remedy="Leave it out to take half of what is free.",
        )
    return amount


def free_bytes() -> int | None:
    """What is free for new processes, as Linux tells it."""
    try:
        lines = MEMORY_INFO.read_text("utf-8").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None
