"""The record of a quantization: what was decided, what it cost, what to worry about."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, Self

from torch.fx import GraphModule

from fxquant.config.quant_config import QuantConfig
from fxquant.errors import (
    AccuracyError,
    OptionError,
    caller_level,
    check_choice,
    check_number,
    check_type,
)
from fxquant.fusion.fused import fused_counts
from fxquant.measure.sensitivity_row import SensitivityRow, as_number
from fxquant.passes.decide import DEFAULT_RULE, FELL_BACK, Decision
from fxquant.passes.fold_norms import FoldedNorm
from fxquant.passes.scale_channels import FoldedScale
from fxquant.report.html import write_html
from fxquant.report.pages import decisions_page
from fxquant.report.tables import format_db, format_shape
from fxquant.report.view import View

INFO_KEY = "fxquant_info"  # gm.meta: the record of the quantization, as plain data
LOOSE = ("bits", "group_size", "symmetric", "observer", "activation_bits")  # without a config
ENOUGH_SAMPLES = 50  # rows of calibration data; with fewer, the record warns
MOST_LOST_DB = 3.0  # from fitted rows to held-out ones: if more is lost, the record warns
FLOAT_SHARE = 0.1  # of the product weights: if more stays float, a warning says why
LAYER_HEADERS = (
    "module", "type", "shape", "params", "action",
    "weight\ndB", "introduced\ndB", "cumulative\ndB", "warning", "why",
)  # fmt: skip


class AccuracyWarning(UserWarning):
    """The quantized model may be less accurate than wanted."""


@dataclass(repr=False)
class QuantizationInfo(View):
    """What a quantization did.

    Attributes:
        decisions: the decisions: one row for each node with parameters.
        rows: what each quantized layer costs.
        calibration_samples_used: rows of the first dimension; 0 without data.
        heldout_samples: how many of these rows chose nothing and were only measured on.
        sqnr_db: output SQNR, float against quantized, on the rows that were held out (on all where
            there are too few to hold any out), padding's tokens left out; None without data.
        fitted_sqnr_db: the same on as many of the rows that chose the integers.
        original_size_mb: true bytes of the traced float model in 10⁶, tied tensors counted once.
        quantized_size_mb: the same of the quantized model.
        config: what was asked for.
        method: the algorithm that chose the integers.
        folded_scales: channel scales that were folded into the graph's parameters.
        folded_norms: each BatchNorm that was folded into the layer before it.
        products: with quantized activations, how the factors of each product of two values are
            rounded, or that they stay float, by the name of its node.
        changed_experts: of a mixture of experts, the share of the tokens that are given other
            experts than in the float model, by the name of the first layer that they are chosen
            for; on the rows that `sqnr_db` is measured on.
        fused: how many nodes of the graph stand for several, by the name of the pattern (see
            `fuse`); empty for a graph that is not fused.
        trace: what tracing did, as plain data.
        warnings: what `check_accuracy_warnings` found.
    """

    decisions: list[Decision]
    rows: list[SensitivityRow] = field(default_factory=list)
    calibration_samples_used: int = 0
    heldout_samples: int = 0
    sqnr_db: float | None = None
    fitted_sqnr_db: float | None = None
    original_size_mb: float = 0.0
    quantized_size_mb: float = 0.0
    config: QuantConfig = field(default_factory=QuantConfig)
    method: str = "rtn"
    folded_scales: list[FoldedScale] = field(default_factory=list)
    folded_norms: list[FoldedNorm] = field(default_factory=list)
    products: dict[str, str] = field(default_factory=dict)
    changed_experts: dict[str, float] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    trace: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    warning_threshold: float = 20.0
    error_threshold: float = 10.0

    @property
    def selected_layers(self) -> list[str]:
        """Names of the layers that were quantized."""
        return [d.module for d in self.decisions if d.action != "float"]

    @property
    def skipped_layers(self) -> list[str]:
        """Names of the nodes with parameters that stayed float."""
        return [d.module for d in self.decisions if d.action == "float"]

    @property
    def compression_ratio(self) -> float:
        """Bytes before divided by bytes after."""
        return self.original_size_mb / self.quantized_size_mb if self.quantized_size_mb else 1.0

    def headline(self) -> str:
        """Layers, size and accuracy in one line."""
        accuracy = "not measured" if self.sqnr_db is None else f"{self.sqnr_db:.1f} dB"
        return (
            f"{len(self.selected_layers)} of {len(self.decisions)} layers quantized by "
            f"{self.method}, {self.original_size_mb:.2f} -> {self.quantized_size_mb:.2f} MB, "
            f"output SQNR {accuracy}, {len(self.warnings)} warnings"
        )

    def columns(self) -> Sequence[str]:
        """The columns of the table of decisions."""
        return LAYER_HEADERS

    def cells(self) -> list[Sequence[Any]]:
        """One row for each node with parameters."""
        measured = {row.module: row for row in self.rows}
        return [_cells(d, measured.get(d.module), self) for d in self.decisions]

    def records(self) -> list[dict[str, Any]]:
        """The decisions with what each layer cost, as mappings of equal keys."""
        measured = {row.module: row for row in self.rows}
        return [_record(decision, measured.get(decision.module)) for decision in self.decisions]

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page: bars and decisions."""
        rows = [asdict(row) for row in self.rows]
        page = decisions_page("Quantization", [asdict(d) for d in self.decisions], rows)
        write_html(path, replace(page, summary=f"{self.summary()}."))

    def summary(self) -> str:
        """What a page begins with."""
        return self.headline()

    def __str__(self) -> str:
        counts = Counter(self.products.values())
        products = "".join(f"\nproducts of activations: {n}, {how}" for how, n in counts.items())
        experts = ""
        if self.changed_experts:
            share = mean(self.changed_experts.values())
            experts = f"\nexperts: {share:.1%} of the tokens get others than in the float model"
        fused = "".join(f"\nfused: {name}, {count}" for name, count in self.fused.items())
        warnings = "".join(f"\nwarning: {text}" for text in self.warnings)
        return f"{super().__str__()}{products}{experts}{fused}{warnings}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = {**asdict(replace(self, config=QuantConfig())), "config": self.config.to_dict()}
        return {**data, "compression_ratio": self.compression_ratio}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Undo `to_dict`, also after JSON, which has neither tuples nor infinite numbers."""
        values = {key: as_number(value) for key, value in data.items()}
        values.pop("compression_ratio", None)
        older = {key: values.pop(key) for key in LOOSE if key in values}
        values["config"] = QuantConfig.from_dict(_finite(data.get("config", older)))
        values["decisions"] = [
            Decision(**{**row, "shape": tuple(row["shape"])}) for row in data["decisions"]
        ]
        values["rows"] = [SensitivityRow.from_dict(row) for row in data.get("rows", ())]
        values["folded_scales"] = [
            FoldedScale(tuple(f["producers"]), tuple(f["readers"]), f["kind"],
                        as_number(f["power"]), as_number(f["gain_db"]))
            for f in data.get("folded_scales", ())
        ]  # fmt: skip
        values["folded_norms"] = [FoldedNorm(**norm) for norm in data.get("folded_norms", ())]
        return cls(**values)


def info(model: GraphModule) -> QuantizationInfo:
    """The record that a quantized or loaded graph carries.

    Args:
        model: a graph from `quantize`, `static_quantize` or `load_model`.

    Raises:
        OptionError: it is no such graph.
    """
    record = model.meta.get(INFO_KEY) if isinstance(model, GraphModule) else None
    if record is None:
        raise OptionError(
            "info",
            found=f"a {type(model).__name__} without a record of its quantization",
            needed="a graph that fxquant quantized or loaded",
            remedy="Pass the graph that quantize, static_quantize or load_model returned. A copy "
            "of your own class (swap_modules) carries no record: keep the graph beside it.",
        )
    return replace(QuantizationInfo.from_dict(record), fused=fused_counts(model))


def _finite(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: as_number(value) if isinstance(value, str) else value for key, value in config.items()
    }


def _record(decision: Decision, row: SensitivityRow | None) -> dict[str, Any]:
    names = ("weight_sqnr_db", "introduced_sqnr_db", "cumulative_sqnr_db")
    costs = {name: None if row is None else getattr(row, name) for name in names}
    return {**asdict(decision), "shape": format_shape(decision.shape), **costs}


def _cells(
    decision: Decision, row: SensitivityRow | None, info: QuantizationInfo
) -> tuple[object, ...]:
    head = (
        decision.module,
        decision.kind,
        format_shape(decision.shape),
        decision.parameters,
        decision.action,
    )
    costs: tuple[str | None, ...] = (None, None, None, None)
    if row is not None:
        costs = (
            format_db(row.weight_sqnr_db),
            format_db(row.introduced_sqnr_db),
            format_db(row.cumulative_sqnr_db),
            row.severity(info.warning_threshold, info.error_threshold),
        )
    rule = "" if decision.rule == DEFAULT_RULE else f" ({decision.rule})"
    return (*head, *costs, decision.reason + rule)


def check_accuracy_warnings(
    info: QuantizationInfo,
    sqnr_warning_threshold: float = 20.0,
    sqnr_error_threshold: float = 10.0,
    on_failure: str = "warn",
) -> QuantizationInfo:
    """Fill `info.warnings`.

    Args:
        info: the record to check.
        sqnr_warning_threshold: SQNR below it, in dB, is `low`.
        sqnr_error_threshold: SQNR below it is `critical`.
        on_failure: `"warn"` shows the findings as one `AccuracyWarning`, `"error"` raises if the
            output or a layer is critical, `"ignore"` only fills the list.

    Returns:
        The same `info`.

    Raises:
        AccuracyError: something is critical and `on_failure` is `"error"`.
        OptionError: a threshold is no number.
    """
    check_type("info", info, QuantizationInfo, "Pass the record that quantize returned.")
    check_choice("on_failure", on_failure, ("error", "warn", "ignore"))
    check_number("sqnr_warning_threshold", sqnr_warning_threshold)
    check_number("sqnr_error_threshold", sqnr_error_threshold)
    info.warning_threshold = sqnr_warning_threshold
    info.error_threshold = sqnr_error_threshold
    critical = list(_layer_warnings(info, "critical", sqnr_error_threshold))
    low = list(_layer_warnings(info, "low", sqnr_warning_threshold))
    if info.sqnr_db is not None and not info.sqnr_db >= sqnr_error_threshold:
        text = f"critical: output SQNR is {info.sqnr_db:.1f} dB, below {sqnr_error_threshold:g} dB"
        critical.insert(0, text)
    elif info.sqnr_db is not None and info.sqnr_db < sqnr_warning_threshold:
        text = f"low: output SQNR is {info.sqnr_db:.1f} dB, below {sqnr_warning_threshold:g} dB"
        low.insert(0, text)
    about_weights = [*_float_products(info), *_rounded_experts(info)]
    info.warnings = [*critical[:1], *about_weights, *critical[1:], *low]
    info.warnings += _general_warnings(info)
    if on_failure == "error" and critical:
        raise AccuracyError(
            "quantized model",
            found="; ".join(critical[:5]),
            needed=f"at least {sqnr_error_threshold:g} dB everywhere",
            remedy="Keep these layers float or at 8 bits, use a smaller group_size, or lower "
            "sqnr_error_threshold.",
        )
    if on_failure == "warn" and info.warnings:
        shown = info.warnings[:5]
        more = len(info.warnings) - len(shown)
        text = "\n  ".join(shown) + (f"\n  and {more} more in info.warnings" if more else "")
        warnings.warn(f"quantization accuracy:\n  {text}", AccuracyWarning, caller_level())
    return info


def _layer_warnings(info: QuantizationInfo, severity: str, threshold: float) -> list[str]:
    found = []
    for row in info.rows:
        if row.severity(info.warning_threshold, info.error_threshold) == severity:
            measured = row.introduced_sqnr_db
            what = "weight" if measured is None else "introduced"
            value = row.weight_sqnr_db if measured is None else measured
            found.append(
                f"{severity}: {row.module}: {what} SQNR {value:.1f} dB, below {threshold:g}"
            )
    return found


def _general_warnings(info: QuantizationInfo) -> list[str]:
    found = []
    if not info.selected_layers:
        found.append("nothing was quantized: the decisions tell why for each layer")
    elif not info.skipped_layers:
        found.append(
            "every layer was quantized, the first and the last too: consider keeping them float "
            "with modules_to_not_convert"
        )
    if info.sqnr_db is not None and info.calibration_samples_used < ENOUGH_SAMPLES:
        found.append(
            f"only {info.calibration_samples_used} calibration samples; "
            f"use at least {ENOUGH_SAMPLES}"
        )
    if info.sqnr_db is None and info.calibration_samples_used and info.rows:
        found.append(
            "the output's SQNR is not measured: after quantizing it has another shape, which "
            "depends on the values of the input. Compare the two models with a metric of your own"
        )
    if info.sqnr_db is not None and info.fitted_sqnr_db is not None:
        lost = info.fitted_sqnr_db - info.sqnr_db
        if lost > MOST_LOST_DB:
            found.append(
                f"rows that were held out are {lost:.1f} dB worse than rows that were fitted to: "
                "the data are few or narrow. Give more rows, of every kind that the model will "
                "see; calibration_text() has text of several registers and languages"
            )
    unverified = info.trace and not info.trace.get("verified")
    if unverified:
        found.append(
            "the graph was not verified against the model: pass example_inputs, a call's arguments"
        )
    return found


def _product_elements(info: QuantizationInfo) -> int:
    """Of all weights that are factors of a product; of the layers', where nothing was traced."""
    traced = info.trace.get("product_elements")
    if traced is not None:
        return sum(traced.values())
    return sum(d.weight_elements for d in info.decisions if d.product is not None)


def _rounded_experts(info: QuantizationInfo) -> list[str]:
    """A warning where more than a tenth of all product weights is of experts that fell back."""
    total = _product_elements(info)
    fell = [d for d in info.decisions if d.product == "expert" and FELL_BACK in d.reason]
    share = sum(d.weight_elements for d in fell) / max(total, 1)
    if share <= FLOAT_SHARE:
        return []
    return [
        f"experts of layers that hold {share:.0%} of the product weights were {FELL_BACK} instead "
        "of fitted (the decisions say how many): each sees only the tokens routed to it. Give more "
        "rows"
    ]


def _float_products(info: QuantizationInfo) -> list[str]:
    """A warning where more than a tenth of all product weights stays float: which, and why."""
    total = _product_elements(info)
    kept = [d for d in info.decisions if d.action == "float" and d.product is not None]
    left = total - sum(
        d.weight_elements for d in info.decisions if d.action != "float" and d.product is not None
    )
    if not total or left <= total * FLOAT_SHARE or not info.decisions:
        return []
    reasons: dict[str, int] = {}
    for d in kept:
        reasons[d.reason] = reasons.get(d.reason, 0) + d.weight_elements
    unseen = total - sum(info.trace.get("traced_elements", {"": total}).values())
    if unseen > 0:
        reasons["in modules that could not be traced"] = unseen
    largest = sorted(reasons.items(), key=lambda item: -item[1])[:3]
    why = "; ".join(f"{count / total:.0%}: {reason}" for reason, count in largest)
    return [f"{left / total:.0%} of the product weights stay float ({why})"]
