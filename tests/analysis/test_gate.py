"""The gate fails what is below the threshold, and refuses what it cannot compare."""

import math

import pytest

from fxquant.analysis.gate import check_report
from fxquant.errors import OptionError


def report(output=25.0, **layers):
    rows = [{"module": name, "introduced_sqnr_db": db} for name, db in layers.items()]
    return {"output_sqnr_db": output, "rows": rows}


def test_figures_below_the_bar_are_named():
    failures = check_report(report(19.0, fc=20.0), min_sqnr_db=20)
    assert [f.module for f in failures] == ["model output"]
    failures = check_report(
        report(25.0, fc=20.0, head=30.0), max_drop_db=1, baseline=report(25.5, fc=22.0, head=30.5)
    )
    assert [str(f) for f in failures] == [
        "fc: 20.00 dB, needs 21.00 dB (baseline 22.00 dB, drop at most 1)"
    ]
    assert check_report(report("inf", fc=20.0), min_sqnr_db=20) == []


@pytest.mark.parametrize(
    ("found", "options", "text"),
    [
        (report(math.nan, fc=20.0), {"min_sqnr_db": 20}, "nan as the SQNR of model output"),
        (report("nan", fc=20.0), {"min_sqnr_db": 20}, "'nan' as the SQNR of model output"),
        (report(None), {"min_sqnr_db": 20}, "no output SQNR"),
        (report(25.0, fc=20.0), {}, "no threshold"),
        (report(25.0, fc=20.0), {"min_sqnr_db": math.nan}, "--min-sqnr nan"),
        (report(25.0, fc=20.0), {"max_drop_db": 1, "baseline": report(25.0)}, "no figure of any"),
        (report(25.0), {"max_drop_db": 1, "baseline": report(25.0, fc=1.0)}, "no figure of any"),
        (report(25.0, fc=math.nan), {"max_drop_db": 1, "baseline": report(fc=1.0)}, "nan as .* fc"),
        (report(25.0, fc=2.0), {"max_drop_db": 1, "baseline": report(fc=math.nan)}, "nan as .* fc"),
        (report(25.0, fc=2.0), {"max_drop_db": -1, "baseline": report(fc=2.0)}, "0 dB or more"),
        (report(25.0, fc=2.0), {"max_drop_db": 1}, "only one of both"),
        (report(25.0, fc=2.0), {"max_drop_db": 1, "baseline": report(a=2.0)}, "no figure for a"),
    ],
)
def test_what_cannot_be_compared_is_no_pass(found, options, text):
    with pytest.raises(OptionError, match=text):
        check_report(found, **options)
