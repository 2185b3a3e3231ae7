"""A sweep over columns, each of which changes the columns after it."""

from collections.abc import Callable

from torch import Tensor

LEAF = 8  # columns that are updated one by one


def lazy_update(values: Tensor, coupling: Tensor, step: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Take a step at each column in order.

    The step at column i gives a change; every later column j then changes by `coupling[i, j]` times
    it. Changes reach far columns by matrix products of halves of halves, so that the work is that
    of a matrix product and not of as many updates of the whole as there are columns.

    Args:
        values: float [columns, rows]; changed in place.
        coupling: [columns, columns]; the part above the diagonal is used.
        step: from a column's number and its values [rows] to its change [rows].

    Returns:
        The changes, [columns, rows].
    """
    changes = values.new_empty(values.shape)
    _lazy_update(values, coupling, step, changes, 0, len(values))
    return changes


def _lazy_update(
    values: Tensor,
    coupling: Tensor,
    step: Callable[[int, Tensor], Tensor],
    changes: Tensor,
    start: int,
    stop: int,
) -> None:
    if stop - start > LEAF:
        middle = (start + stop) // 2
        _lazy_update(values, coupling, step, changes, start, middle)
        values[middle:stop].addmm_(coupling[start:middle, middle:stop].T, changes[start:middle])
        _lazy_update(values, coupling, step, changes, middle, stop)
        return
    for i in range(start, stop):
        changes[i] = step(i, values[i])
        if i + 1 < stop:
            values[i + 1 : stop].addr_(coupling[i, i + 1 : stop], changes[i])
