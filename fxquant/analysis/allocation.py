"""`allocate`: bits where they pay, within a budget.

Errors of layers quantized alone add up to a fair prediction of the error of all of them, so the
best allocation is a multiple-choice knapsack: one width for each layer, least summed error, bytes
within the budget. It is solved exactly by dynamic programming over bytes. Errors do not really add
up, so the plan is then run, and a uniform one is returned where that is better.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fxquant.analysis.sensitivity_report import SensitivityReport
from fxquant.config.option_checks import FLOAT_BITS
from fxquant.errors import BudgetError, OptionError, check_type
from fxquant.measure.output_metric import db_of
from fxquant.measure.sensitivity_row import SensitivityRow

STEPS = 4096  # resolution of the budget
DB_PER_BIT = 6.02  # of a uniform quantizer: each bit halves the step


class Allocation(dict[str, int]):
    """Bits by module name, with what they are worth.

    Attributes:
        average_bits: per weight element.
        bytes: of the weights at these widths, scales left aside.
        predicted_sqnr_db: from the summed errors; None where the report has none of the output.
        measured_sqnr_db: of a run; None where the report cannot run the model.
    """

    average_bits: float
    bytes: float
    predicted_sqnr_db: float | None
    measured_sqnr_db: float | None = None


@dataclass(frozen=True)
class _Group:
    """Layers that get the same width."""

    modules: tuple[str, ...]
    elements: int
    errors: dict[int, float]


def allocate(
    report: SensitivityReport,
    *,
    average_bits: float | None = None,
    max_bytes: float | None = None,
    min_sqnr_db: float | None = None,
    choices: Sequence[int] = (4, 8, 16),
    keep_together: bool = False,
) -> Allocation:
    """Choose a width for each layer.

    Args:
        report: from `sensitivity`; `method="exact"` or `"gradient"` predict the output's error,
            `"local"` knows only each layer's own.
        average_bits: the budget as bits per weight element.
        max_bytes: the budget as bytes of all weights, scales left aside.
        min_sqnr_db: instead of a budget: the least bytes whose output SQNR, measured where the
            report can run the model, is at least this.
        choices: widths to choose from, among 4, 8 and 16 (float).
        keep_together: give layers that share an input or a weight the same width.

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
    groups = _groups(report, tuple(sorted(set(choices))), keep_together)
    elements = sum(g.elements for g in groups)
    if min_sqnr_db is not None:
        return _least_bytes(report, groups, min_sqnr_db)
    bits = average_bits if average_bits is not None else 8 * (max_bytes or 0) / elements
    least = min(choices)
    if bits < least:
        raise BudgetError(
            "allocate",
            found=f"a budget of {bits:.3g} bits a weight ({bits * elements / 8:,.0f} bytes)",
            needed=f"at least {least} bits ({least * elements / 8:,.0f} bytes)",
            remedy="Raise the budget or allow narrower choices.",
        )
    return _verified(report, groups, bits)


def pareto(
    report: SensitivityReport,
    averages: Sequence[float] = (4, 4.25, 4.5, 5, 5.5, 6, 7, 8),
    choices: Sequence[int] = (4, 8),
) -> list[Allocation]:
    """The best allocation at each of several average widths."""
    return [allocate(report, average_bits=a, choices=choices) for a in averages]


def _groups(
    report: SensitivityReport, choices: tuple[int, ...], keep_together: bool
) -> list[_Group]:
    members: dict[str, list[SensitivityRow]] = {}
    for row in report.rows:
        key = row.shares_input or row.module
        members.setdefault(key if keep_together else row.module, []).append(row)
    return [
        _Group(
            tuple(r.module for r in rows),
            sum(math.prod(r.shape) for r in rows),
            {b: sum(_error(r, b) for r in rows) for b in choices},
        )
        for rows in members.values()
    ]


def _error(row: SensitivityRow, bits: int) -> float:
    if bits == FLOAT_BITS:
        return 0.0
    if bits in row.output_errors:
        return row.output_errors[bits]
    if row.output_errors or bits not in (4, 8):
        raise OptionError(
            "choices",
            found=f"{bits} bits",
            needed=f"widths the report measured: {sorted(row.output_errors) or [4, 8]}, or 16",
            remedy="Leave this choice out.",
        )
    own = row.introduced_sqnr_db if row.introduced_sqnr_db is not None else row.weight_sqnr_db
    return float(10 ** (-(own + DB_PER_BIT * (bits - row.bits)) / 10))


def _solve(groups: Sequence[_Group], bits: float) -> dict[str, int]:
    """The least summed error with at most `bits` per element, by dynamic programming."""
    choices = sorted(groups[0].errors) if groups else []
    elements = sum(g.elements for g in groups)
    least = choices[0] if choices else 0
    if choices and bits >= choices[-1]:
        return {name: choices[-1] for group in groups for name in group.modules}
    unit = max(elements * (bits - least) / STEPS, 1e-3)  # above the narrowest plan
    best = torch.zeros(STEPS + 1, dtype=torch.float64)
    picks: list[torch.Tensor] = []
    for group in groups:
        options = []
        for width in choices:
            cost = _steps(group, width - least, unit)
            shifted = torch.full_like(best, torch.inf)
            if cost <= STEPS:
                shifted[cost:] = best[: STEPS + 1 - cost] + group.errors[width]
            options.append(shifted)
        stacked = torch.stack(options)
        best, pick = stacked.min(0)
        picks.append(pick)
    place, found = STEPS, {}
    for group, pick in zip(reversed(groups), reversed(picks), strict=True):
        width = choices[int(pick[place])]
        found.update(dict.fromkeys(group.modules, width))
        place -= _steps(group, width - least, unit)
    return {name: found[name] for group in groups for name in group.modules}


def _steps(group: _Group, extra_bits: int, unit: float) -> int:
    """What `extra_bits` a weight cost, in whole steps of the budget."""
    return math.ceil(group.elements * extra_bits / unit - 1e-6)


def _verified(report: SensitivityReport, groups: Sequence[_Group], bits: float) -> Allocation:
    """The solved plan, or the widest uniform one that fits where it measures better."""
    plan = _describe(report, groups, _solve(groups, bits))
    fitting = [b for b in groups[0].errors if b <= bits] if groups else []
    if report.evaluate is None or not fitting:
        return plan
    plan.measured_sqnr_db = report.evaluate(dict(plan))
    names = [name for group in groups for name in group.modules]
    uniform = _describe(report, groups, dict.fromkeys(names, max(fitting)))
    if dict(uniform) != dict(plan):
        uniform.measured_sqnr_db = report.evaluate(dict(uniform))
        if uniform.measured_sqnr_db > plan.measured_sqnr_db:
            return uniform
    return plan


def _least_bytes(
    report: SensitivityReport, groups: Sequence[_Group], min_sqnr_db: float
) -> Allocation:
    low, high = min(groups[0].errors), max(groups[0].errors)
    best = _verified(report, groups, high)
    if not _sqnr(best) >= min_sqnr_db:
        raise BudgetError(
            "allocate",
            found=f"a least output SQNR of {min_sqnr_db:g} dB",
            needed=f"at most {_sqnr(best):.1f} dB, what {high} bits everywhere give",
            remedy="Lower min_sqnr_db or allow wider choices.",
        )
    left, right = float(low), float(high)
    for _ in range(8):  # to 1/256 of the span of widths
        middle = (left + right) / 2
        plan = _verified(report, groups, middle)
        if _sqnr(plan) >= min_sqnr_db:
            best, right = plan, middle
        else:
            left = middle
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
    elements = sum(g.elements for g in groups)
    total = sum(g.elements * bits[g.modules[0]] for g in groups)
    plan.average_bits, plan.bytes = total / max(elements, 1), total / 8
    error = sum(g.errors[bits[g.modules[0]]] for g in groups)
    is_predicted = report.metric == "sqnr" and any(r.output_errors for r in report.rows)
    plan.predicted_sqnr_db = db_of(error) if is_predicted else None
    plan.measured_sqnr_db = None
    return plan
