"""Hold part of the calibration data out: numbers are measured on what did not choose integers."""

from collections.abc import Callable, Sequence

from fxquant.graph.calls import Call

SHARE = 8  # one row in so many
MOST_ROWS = 32


def hold_out(
    calls: Sequence[Call], accepts: Callable[[Call], bool] = lambda call: True
) -> tuple[list[Call], list[Call]]:
    """`(batches to fit to, batches to measure on)`.

    The last rows are held out, an eighth of all, at least one and at most 32. A single row, and
    batches that cannot be cut (see `Call.rows`) or are not accepted then, stay whole: of several
    batches one is held out then, of a single one nothing.
    """
    total = sum(call.row_count for call in calls)
    wanted = min(max(total // SHARE, 1), MOST_ROWS)
    if total < 2:
        return list(calls), []
    fitted, held = list(calls), list[Call]()
    while wanted > 0 and fitted:
        last = fitted[-1]
        if last.row_count <= wanted and len(fitted) > 1:
            held.insert(0, fitted.pop())
            wanted -= last.row_count
            continue
        keep = last.row_count - wanted
        front, back = last.rows(0, keep), last.rows(keep, last.row_count)
        if keep > 0 and front.row_count == keep and accepts(front) and accepts(back):
            fitted[-1] = front
            held.insert(0, back)
        elif not held and len(fitted) > 1:
            held.insert(0, fitted.pop())
        break
    return fitted, held
