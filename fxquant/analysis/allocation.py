"""`allocate`: bits where they pay, within a budget.

Errors of layers quantized alone add up to a fair prediction of the error of all of them, so the
best allocation is a multiple-choice knapsack: one width for each layer, least summed error, cost
within the budget (see `knapsack.py`). Errors of few bits do not really add up, so several plans are
run: the best one with all widths, those without the narrowest ones, and the widest uniform one that
fits. The one whose output is measured best is returned.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from fxquant.analysis.knapsack import Item, least_errors
from fxquant.analysis.sensitivity_report import SensitivityReport
from fxquant.config.option_checks import FLOAT_BITS
from fxquant.errors import BudgetError, OptionError, check_number, check_type
from fxquant.graph.left_alone import process_left_alone
from fxquant.measure.output_metric import db_of
from fxquant.measure.sensitivity_row import SensitivityRow

DB_PER_BIT = 6.02  # of a uniform quantizer: each bit halves the step
HALVINGS = 8  # of the span between the smallest and the largest file


class Allocation(dict[str, int]):
    """Bits by module name, with what they are worth.

    Attributes:
        average_bits: per weight element; a float layer counts what it takes in the file.
        bytes: of all tensors in the file at these widths.
        predicted_sqnr_db: from the summed errors; None where the report has none of the output.
        measured_sqnr_db: of a run; None where the report cannot run the model.
    """

    average_bits: float
    bytes: int
    predicted_sqnr_db: float | None
    measured_sqnr_db: float | None = None


@dataclass(frozen=True)
class _Group:
    """Layers that get the same width.

    Attributes:
        modules: their names.
        elements: of their weights; one that they share counts once.
        errors: summed, by the widths that all of them can have.
        sizes: bytes in a file, by width.
    """

    modules: tuple[str, ...]
    elements: int
    errors: dict[int, float]
    sizes: dict[int, int]

    def bits(self, width: int) -> float:
        """Of all weights, in whole; float layers count what they take in the file."""
        return 8 * self.sizes[width] if width == FLOAT_BITS else width * self.elements


_Cost = Callable[[_Group, int], float]


def allocate(
    report: SensitivityReport,
    *,
    average_bits: float | None = None,
    max_bytes: float | None = None,
    min_sqnr_db: float | None = None,
    choices: Sequence[int] | None = None,
    keep_together: bool = False,
) -> Allocation:
    """Choose a width for each layer.

    A layer with fewer inputs than a group has 8 bits or stays float; layers that share a weight
    have the same width.

    Args:
        report: from `sensitivity`; `method="exact"` or `"gradient"` predict the output's error,
            `"local"` knows only each layer's own.
        average_bits: the budget as bits per weight element, scales left aside: 4 is what 4 bits
            everywhere take. The file is then at most as large as theirs.
        max_bytes: the budget as bytes of all tensors in the file: integers, scales, zero points,
            biases, and all that stays float.
        min_sqnr_db: instead of a budget: the smallest file whose output SQNR, measured where the
            report can run the model, is at least this.
        choices: widths to choose from, among 2, 3, 4, 5, 6, 8 and 16 (float). None: all of them
            that the report knows.
        keep_together: give layers that share an input the same width.

    Returns:
        Bits by module name, for `static_quantize(bits=...)`.

    Raises:
        BudgetError: nothing fits the budget; the text says what is possible.
        OptionError: not exactly one budget was given, or a choice is unknown.
    """
    check_type("report", report, SensitivityReport, "Pass what fxquant.sensitivity returned.")
    budgets = (average_bits, max_bytes, min_sqnr_db)
    if sum(b is not None for b in budgets) != 1:
        raise OptionError(
            "allocate",
            found=f"{sum(b is not None for b in budgets)} budgets",
            needed="exactly one of average_bits, max_bytes and min_sqnr_db",
            remedy="Pass one of them.",
        )
    names = ("average_bits", "max_bytes", "min_sqnr_db")
    for name, budget in zip(names, budgets, strict=True):
        if budget is not None:
            check_number(name, budget)
    _check_choices(report, choices)
    groups = _groups(report, choices, keep_together)
    with process_left_alone():  # plans are run
        return _allocated(report, groups, average_bits, max_bytes, min_sqnr_db)


def _allocated(
    report: SensitivityReport,
    groups: Sequence[_Group],
    average_bits: float | None,
    max_bytes: float | None,
    min_sqnr_db: float | None,
) -> Allocation:
    if min_sqnr_db is not None:
        return _smallest_file(report, groups, min_sqnr_db)
    if max_bytes is not None:
        return _best_within(report, groups, max_bytes - report.other_bytes, _file_bytes)
    elements = sum(g.elements for g in groups)
    return _best_within(report, groups, (average_bits or 0) * elements, _Group.bits)


def to_be_compared(report: SensitivityReport, average_bits: float) -> list[Allocation]:
    """What to quantize with before one is chosen: the best mix of widths, and one width for all.

    Layers that are fitted make up for the errors of those before them, so what a mix is worth shows
    when it is fitted as a whole, and not by the report's layers, which were fitted one by one.

    Returns:
        One allocation or two: the mix, and one width for all that can have it.

    Raises:
        BudgetError: nothing fits the budget.
    """
    chosen = allocate(report, average_bits=average_bits)
    groups = _groups(report, None, keep_together=False)
    budget = average_bits * sum(group.elements for group in groups)
    plans = [_describe(report, groups, bits) for bits in _plans(groups, budget, _Group.bits)]
    uniform = plans[-1]
    return [*[plan for plan in (chosen, *plans) if plan != uniform][:1], uniform]


def pareto(
    report: SensitivityReport,
    averages: Sequence[float] = (2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8),
    choices: Sequence[int] | None = None,
) -> list[Allocation]:
    """The best allocation at each of several average widths, as far as there are any."""
    groups = _groups(report, choices, keep_together=False)
    elements = sum(g.elements for g in groups)
    least = sum(min(map(g.bits, g.errors)) for g in groups)
    possible = [a for a in averages if a * elements >= least]
    return [allocate(report, average_bits=a, choices=choices) for a in possible]


def _file_bytes(group: _Group, width: int) -> float:
    return group.sizes[width]


def _known_widths(report: SensitivityReport) -> list[int]:
    return sorted({b for row in report.rows for b in row.saved_bytes})


def _check_choices(report: SensitivityReport, choices: object) -> None:
    if choices is None:
        return
    known = _known_widths(report)
    found = None
    if not isinstance(choices, Collection) or isinstance(choices, str | bytes) or not choices:
        found = repr(choices)
    else:
        found = next((repr(c) for c in choices if isinstance(c, bool) or c not in known), None)
    if found is not None:
        raise OptionError(
            "choices",
            found=found,
            needed=f"widths the report measured, some of {known}",
            remedy="Leave choices out for all of them.",
        )


def _groups(
    report: SensitivityReport, choices: Sequence[int] | None, keep_together: bool
) -> list[_Group]:
    known = _known_widths(report)
    members: dict[str, list[SensitivityRow]] = {}
    for row in report.rows:
        own = row.shares_weight or row.module
        members.setdefault((row.shares_input or own) if keep_together else own, []).append(row)
    return [_group(rows, known if choices is None else choices) for rows in members.values()]


def _group(rows: Sequence[SensitivityRow], choices: Sequence[int]) -> _Group:
    possible = set.intersection(*(set(row.saved_bytes) for row in rows))
    # What is too narrow for all the choices gets the least that it can have.
    widths = sorted(possible & set(choices)) or [min(possible)]
    return _Group(
        tuple(row.module for row in rows),
        sum(math.prod(row.shape) for row in rows if not row.shares_weight),
        {b: sum(_error(row, b) for row in rows) for b in widths},
        {b: sum(row.saved_bytes[b] for row in rows) for b in widths},
    )


def _error(row: SensitivityRow, bits: int) -> float:
    if bits == FLOAT_BITS:
        return 0.0
    if row.output_errors:
        return row.output_errors[bits]
    own = row.introduced_sqnr_db if row.introduced_sqnr_db is not None else row.weight_sqnr_db
    return float(10 ** (-(own + DB_PER_BIT * (bits - row.bits)) / 10))


def _best_within(
    report: SensitivityReport, groups: Sequence[_Group], budget: float, cost: _Cost
) -> Allocation:
    """The plan with the best output among those that the budget allows."""
    least = sum(min(cost(g, b) for b in g.errors) for g in groups)
    if budget < least:
        raise _too_small(groups, budget, least, cost, report)
    plans = [_describe(report, groups, bits) for bits in _plans(groups, budget, cost)]
    if report.evaluate is None or report.evaluate_error is None:
        return plans[0]
    errors = [report.evaluate_error(dict(plan)) for plan in plans]
    best = plans[errors.index(min(errors))]
    best.measured_sqnr_db = report.evaluate(dict(best))
    return best


def _plans(groups: Sequence[_Group], budget: float, cost: _Cost) -> list[dict[str, int]]:
    """The plans to compare, by module name: the one of the least summed error first."""
    widths = sorted({b for g in groups for b in g.errors})
    found: list[dict[str, int]] = []
    cheapest: list[int] = []
    for narrowest in widths:
        kept = [[b for b in g.errors if b >= narrowest] or [max(g.errors)] for g in groups]
        items = [
            Item({b: cost(g, b) for b in allowed}, {b: g.errors[b] for b in allowed})
            for g, allowed in zip(groups, kept, strict=True)
        ]
        chosen = least_errors(items, budget)
        if chosen is None:  # what is narrower fits
            break
        cheapest = [min(item.costs, key=item.costs.__getitem__) for item in items]
        found.append(_by_name(groups, chosen))
    found.append(_by_name(groups, cheapest))  # one width for all that can have it
    return [plan for i, plan in enumerate(found) if plan not in found[:i]]


def _by_name(groups: Sequence[_Group], widths: Sequence[int]) -> dict[str, int]:
    return {n: b for g, b in zip(groups, widths, strict=True) for n in g.modules}


def _too_small(
    groups: Sequence[_Group], budget: float, least: float, cost: _Cost, report: SensitivityReport
) -> BudgetError:
    widest = min(b for g in groups for b in g.errors)
    if cost is _Group.bits:
        elements = max(sum(g.elements for g in groups), 1)
        found = f"{budget / elements:.3g} bits a weight"
        needed = f"at least {least / elements:.3g} bits a weight"
    else:
        other = report.other_bytes
        found = f"{budget + other:,.0f} bytes"
        needed = f"at least {least + other:,.0f} bytes, {other:,.0f} of them for what stays float"
    return BudgetError(
        "allocate",
        found=f"a budget of {found}",
        needed=f"{needed}, which {widest} bits take",
        remedy="Raise the budget or allow narrower choices.",
    )


def _smallest_file(
    report: SensitivityReport, groups: Sequence[_Group], min_sqnr_db: float
) -> Allocation:
    low = float(sum(min(g.sizes.values()) for g in groups))
    high = float(sum(max(g.sizes.values()) for g in groups))
    best = _best_within(report, groups, high, _file_bytes)
    if not _sqnr(best) >= min_sqnr_db:
        widest = max(b for g in groups for b in g.errors)
        raise BudgetError(
            "allocate",
            found=f"a least output SQNR of {min_sqnr_db:g} dB",
            needed=f"at most {_sqnr(best):.1f} dB, what {widest} bits everywhere give",
            remedy="Lower min_sqnr_db or allow wider choices.",
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        plan = _best_within(report, groups, middle, _file_bytes)
        if _sqnr(plan) >= min_sqnr_db:
            best, high = plan, middle
        else:
            low = middle
    return best


def _sqnr(plan: Allocation) -> float:
    measured = plan.measured_sqnr_db
    value = measured if measured is not None else plan.predicted_sqnr_db
    if value is None:
        raise OptionError(
            "min_sqnr_db",
            found="a report that neither predicts nor measures the output",
            needed="a report of method 'exact' or 'gradient'",
            remedy="Call sensitivity(..., method='gradient').",
        )
    return value


def _describe(
    report: SensitivityReport, groups: Sequence[_Group], bits: Mapping[str, int]
) -> Allocation:
    plan = Allocation(bits)
    chosen = [(g, bits[g.modules[0]]) for g in groups]
    elements = sum(g.elements for g in groups)
    plan.average_bits = sum(g.bits(b) for g, b in chosen) / max(elements, 1)
    plan.bytes = report.other_bytes + sum(g.sizes[b] for g, b in chosen)
    is_predicted = report.metric == "sqnr" and any(r.output_errors for r in report.rows)
    plan.predicted_sqnr_db = db_of(sum(g.errors[b] for g, b in chosen)) if is_predicted else None
    plan.measured_sqnr_db = None
    return plan
