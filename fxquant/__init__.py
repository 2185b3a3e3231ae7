"""Graph-level post-training quantization on torch.fx.

The public names are loaded when they are first used, so `import fxquant` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxquant.analysis.quantization_info import (
        AccuracyWarning as AccuracyWarning,
    )
    from fxquant.analysis.quantization_info import (
        QuantizationInfo as QuantizationInfo,
    )

__version__ = "0.1.0"

_HOMES = {
    "fxquant.analysis.draw": ("draw",),
    "fxquant.analysis.graph_diff": ("GraphDiff", "diff"),
    "fxquant.analysis.graph_view": ("to_networkx",),
    "fxquant.analysis.quantization_info": (
        "AccuracyWarning",
        "QuantizationInfo",
        "check_accuracy_warnings",
    ),
    "fxquant.analysis.allocation": ("Allocation", "allocate", "pareto"),
    "fxquant.analysis.sensitivity": ("sensitivity",),
    "fxquant.analysis.sensitivity_report": ("SensitivityReport", "SensitivityRow"),
    "fxquant.errors": (
        "AccuracyError",
        "BudgetError",
        "CalibrationError",
        "FxquantError",
        "LoadError",
        "OptionError",
        "RuleError",
        "SaveError",
        "TraceError",
        "WeightError",
    ),
    "fxquant.modules.linear_int4": ("QuantizedLinearInt4",),
    "fxquant.modules.linear_int8": ("QuantizedLinearInt8",),
    "fxquant.numerics.metrics": ("sqnr_db",),
    "fxquant.numerics.weights": (
        "calculate_scale_zp_groupwise",
        "dequantize_weight_int4",
        "quantize_weight_int4",
    ),
    "fxquant.observers": (
        "HistogramObserver",
        "MinMaxObserver",
        "MovingAverageMinMaxObserver",
        "Observer",
        "create_observer",
    ),
    "fxquant.passes.calibrate": ("calibrate",),
    "fxquant.passes.decide": ("Decision",),
    "fxquant.passes.insert_observers": ("insert_observers",),
    "fxquant.passes.rewrite": ("dequantize_model",),
    "fxquant.passes.rules": ("DEFAULT_INT4_SKIP",),
    "fxquant.pipeline": ("plan", "quantize", "static_quantize"),
    "fxquant.serialization.files": ("load_model", "save_model"),
    "fxquant.swap": ("load_into", "swap_modules"),
    "fxquant.tracing.trace": ("trace",),
    "fxquant.tracing.trace_report": ("TraceReport", "trace_report"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fxquant' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
