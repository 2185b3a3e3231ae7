"""Which batches are summed together: it must depend on the data alone, not on the processes."""

MOST_PARTS = 16  # each is sent to all processes; more of these than parts have nothing to sum


def parts_of(count: int) -> list[range]:
    """The numbers of `count` batches in runs, at most `MOST_PARTS`, as equal as can be.

    >>> parts_of(3)
    [range(0, 1), range(1, 2), range(2, 3)]
    >>> [len(part) for part in parts_of(40)]
    [2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3]
    """
    parts = min(count, MOST_PARTS)
    return [range(i * count // parts, (i + 1) * count // parts) for i in range(parts)]
