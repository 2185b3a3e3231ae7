"""Graph-level post-training quantization on torch.fx: the names that users call."""

from .analysis.allocation import Allocation, allocate, pareto
from .analysis.sensitivity import sensitivity
from .analysis.sensitivity_report import SensitivityReport
from .config.quant_config import QuantConfig
from .config.skip_rules import DEFAULT_INT4_SKIP
from .errors import (
    AccuracyError,
    BudgetError,
    CalibrationError,
    FxquantError,
    LoadError,
    OptionError,
    ProcessGroupError,
    RuleError,
    SaveError,
    TraceError,
    WeightError,
)
from .exporters.export import check_export, export
from .exporters.findings import Finding
from .exporters.load import load_checkpoint
from .exporters.placing import RoundedScalesWarning
from .exporters.stream import quantize_checkpoint
from .fusion.fuse import fuse
from .fusion.modules import fuse_modules
from .measure.quantization_info import (
    AccuracyWarning,
    QuantizationInfo,
    check_accuracy_warnings,
    info,
)
from .measure.sensitivity_row import SensitivityRow
from .modules.linear_int4 import QuantizedLinearInt4
from .modules.linear_int8 import QuantizedLinearInt8
from .modules.linear_intn import QuantizedLinearIntN
from .numerics.metrics import sqnr_db
from .numerics.weights import (
    calculate_scale_zp_groupwise,
    dequantize_weight_int4,
    quantize_weight_int4,
)
from .observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    Observer,
    create_observer,
)
from .passes.calibrate import calibrate
from .passes.decide import Decision
from .passes.insert_observers import insert_observers
from .passes.rewrite import dequantize_model
from .pipeline import quantize, static_quantize
from .planning.plan import plan
from .serialization.files import load_model, save_model
from .swap import load_into, swap_modules
from .texts.calibration_text import calibration_text
from .tracing.trace import trace
from .tracing.trace_report import TraceReport, trace_report
from .view.draw import draw
from .view.graph_diff import GraphDiff, diff
from .view.graph_view import to_networkx

__version__: str

__all__ = [
    "DEFAULT_INT4_SKIP",
    "AccuracyError",
    "AccuracyWarning",
    "Allocation",
    "BudgetError",
    "CalibrationError",
    "Decision",
    "Finding",
    "FxquantError",
    "GraphDiff",
    "HistogramObserver",
    "LoadError",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "OptionError",
    "ProcessGroupError",
    "QuantConfig",
    "QuantizationInfo",
    "QuantizedLinearInt4",
    "QuantizedLinearInt8",
    "QuantizedLinearIntN",
    "RoundedScalesWarning",
    "RuleError",
    "SaveError",
    "SensitivityReport",
    "SensitivityRow",
    "TraceError",
    "TraceReport",
    "WeightError",
    "allocate",
    "calculate_scale_zp_groupwise",
    "calibrate",
    "calibration_text",
    "check_accuracy_warnings",
    "check_export",
    "create_observer",
    "dequantize_model",
    "dequantize_weight_int4",
    "diff",
    "draw",
    "export",
    "fuse",
    "fuse_modules",
    "info",
    "insert_observers",
    "load_checkpoint",
    "load_into",
    "load_model",
    "pareto",
    "plan",
    "quantize",
    "quantize_checkpoint",
    "quantize_weight_int4",
    "save_model",
    "sensitivity",
    "sqnr_db",
    "static_quantize",
    "swap_modules",
    "to_networkx",
    "trace",
    "trace_report",
]
