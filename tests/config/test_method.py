import pytest

from fxquant.config.method import Recipe, parse_method
from fxquant.errors import OptionError


@pytest.mark.parametrize(
    ("method", "with_data", "name"),
    [
        ("auto", True, "gptq"),
        ("auto", False, "rtn"),
        ("best", True, "gptq+refine"),
        ("best", False, "rtn"),
        ("hqq", False, "hqq"),
        ("awq", True, "awq+rtn"),
        ("gptq+smoothquant", True, "smoothquant+gptq"),
        ("smoothquant+awq+hqq", True, "smoothquant+awq+hqq"),
    ],
)
def test_names_stand_for_steps(method, with_data, name):
    assert parse_method(method, has_data=with_data).name == name


@pytest.mark.parametrize(
    ("method", "with_data", "text"),
    [
        ("gptqq", True, "Did you mean 'gptq'"),
        ("", True, "one of 'rtn'"),
        (None, True, "one of 'rtn'"),
        ("awq+", True, "joined by"),
        ("rtn+gptq", True, "at most one of rtn, hqq, gptq"),
        ("awq+awq", True, "no step twice"),
        ("gptq", False, "'gptq' without calibration data.*static_quantize"),
        ("awq+rtn", False, "'awq' without calibration data"),
        ("best+awq", True, "joined by"),
    ],
)
def test_wrong_names_say_what_is_valid(method, with_data, text):
    with pytest.raises(OptionError, match=text):
        parse_method(method, has_data=with_data)


def test_a_recipe_says_what_it_does():
    assert parse_method("awq+gptq", has_data=True) == Recipe(("awq",), "gptq")
