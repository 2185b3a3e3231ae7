import subprocess
import sys
from pathlib import Path

import pytest

import fxquant

ROOT = Path(__file__).parent.parent
PUBLIC = [
    "AccuracyError", "AccuracyWarning", "Allocation", "BudgetError", "CalibrationError",
    "DEFAULT_INT4_SKIP", "Decision", "Finding", "FxquantError", "GraphDiff", "HistogramObserver",
    "LoadError", "MinMaxObserver", "MovingAverageMinMaxObserver", "Observer", "OptionError",
    "ProcessGroupError",
    "QuantConfig", "QuantizationInfo", "QuantizedLinearInt4", "QuantizedLinearInt8",
    "QuantizedLinearIntN", "RoundedScalesWarning", "RuleError", "SaveError", "SensitivityReport",
    "SensitivityRow",
    "TraceError", "TraceReport", "WeightError", "allocate", "calculate_scale_zp_groupwise",
    "calibrate", "calibration_text", "check_accuracy_warnings", "check_export", "create_observer",
    "dequantize_model", "dequantize_weight_int4", "diff", "draw", "export", "fuse",
    "fuse_modules", "info", "insert_observers",
    "load_checkpoint", "load_into", "load_model", "pareto", "plan", "quantize",
    "quantize_checkpoint",
    "quantize_weight_int4", "save_model", "sensitivity", "sqnr_db", "static_quantize",
    "swap_modules", "to_networkx", "trace", "trace_report",
]  # fmt: skip


def test_the_public_names_are_pinned_and_exist():
    assert fxquant.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(getattr(fxquant, name), "__name__", "DEFAULT_INT4_SKIP") == name
    with pytest.raises(AttributeError, match="nothing"):
        fxquant.nothing  # noqa: B018


def test_importing_the_package_does_not_import_torch():
    code = "import sys, fxquant; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


SCRIPT = """
import torch
import fxquant

model = torch.nn.Sequential(torch.nn.Linear(256, 256))
graph, info = fxquant.quantize(model, bits=4)
reveal_type(info)
reveal_type(graph)
reveal_type(fxquant.trace_report(graph).coverage)
fxquant.quantize(model, bots=4)
"""


def test_a_type_checker_sees_the_public_names_in_a_users_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    text = subprocess.run(
        [sys.executable, "-m", "mypy", str(script)],  # the options and the cache of `make lint`
        capture_output=True, text=True, check=False, cwd=ROOT,
    ).stdout  # fmt: skip
    assert 'Revealed type is "fxquant.measure.quantization_info.QuantizationInfo"' in text
    assert 'Revealed type is "torch.fx.graph_module.GraphModule"' in text
    assert 'Revealed type is "float"' in text
    assert 'Unexpected keyword argument "bots"' in text
    wrong = {line.split(":")[1] for line in text.splitlines() if " error: " in line}
    assert wrong == {str(1 + SCRIPT.splitlines().index("fxquant.quantize(model, bots=4)"))}
