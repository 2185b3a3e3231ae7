"""The built-in text, and the warning that tells when it is worth a try."""

import pytest
import torch

import fxquant
from fxquant.texts.calibration_text import REGISTERS

MEASURED_LANGUAGES = {"chinese", "german", "spanish", "russian"}


def test_passages_are_short_different_and_of_all_registers_from_the_start():
    passages = fxquant.calibration_text(None)
    assert len(passages) > 1_200
    assert len(set(passages)) == len(passages)
    assert all(30 < len(passage) < 300 for passage in passages)
    assert len(fxquant.calibration_text()) == 512
    first = fxquant.calibration_text(32)
    assert first == passages[:32]
    assert sum(not passage.isascii() for passage in first) >= 6  # languages
    assert sum("\n" in passage for passage in first) >= 4  # source code


@pytest.mark.parametrize("count", [10, 100, 500])
def test_any_number_of_passages_is_the_same_mixture(count):
    whole = len(fxquant.calibration_text(None))
    taken = set(fxquant.calibration_text(count))
    for register in REGISTERS:
        its = fxquant.calibration_text(None, [register])
        assert len(taken.intersection(its)) == pytest.approx(len(its) * count / whole, abs=1)


def test_some_registers_are_taken_alone():
    others = [name for name in REGISTERS if name not in MEASURED_LANGUAGES]
    without = fxquant.calibration_text(None, others)
    only = fxquant.calibration_text(None, MEASURED_LANGUAGES)
    assert {*without, *only} == set(fxquant.calibration_text(None))
    assert not set(without) & set(only)


@pytest.mark.parametrize("count", [0, 100_000, True, "8"])
def test_a_number_that_cannot_be_had_is_refused(count):
    with pytest.raises(fxquant.OptionError, match=r"calibration_text: got count=.*1 to 1\d\d\d"):
        fxquant.calibration_text(count)


@pytest.mark.parametrize("registers", [[], ["poems"], "prose"])
def test_a_register_that_is_not_there_is_refused(registers):
    with pytest.raises(
        fxquant.OptionError, match="got registers=.* some of languages, source code"
    ):
        fxquant.calibration_text(8, registers)


@pytest.mark.parametrize("is_narrow", [True, False])
def test_a_record_warns_where_what_was_fitted_does_not_hold_on_other_rows(is_narrow):
    generator = torch.Generator().manual_seed(0)
    common, rare = torch.randn(2, 8, 256, generator=generator)  # directions of inputs
    data = torch.randn(160, 8, generator=generator) @ common
    late = data[-20:] if is_narrow else data  # the last eighth is held out
    late += torch.randn(len(late), 8, generator=generator) @ rare
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 64))
    _, info = fxquant.quantize(model, [data], method="gptq", accuracy_warning="ignore")
    lost = info.fitted_sqnr_db - info.sqnr_db
    warned = [text for text in info.warnings if "the data are few or narrow" in text]
    assert len(warned) == is_narrow, (lost, info.warnings)
    if is_narrow:
        assert warned[0].startswith(f"rows that were held out are {lost:.1f} dB worse")
