import pytest
import torch

from fxquant.errors import OptionError
from fxquant.kernels.choose import BACKENDS, choose_backend, explain_backend
from fxquant.kernels.interface import LinearSpec

CPU = torch.device("cpu")
ODD = LinearSpec(8, 40, group_size=20, symmetric=True)
PLAIN = LinearSpec(16, 64, group_size=32, symmetric=True)


def test_reasons_tell_why_a_backend_was_not_chosen():
    backend, reasons = choose_backend(ODD, CPU)
    assert backend.name == "reference"
    assert "group_size is 20" in reasons["aten"]


def test_the_fastest_backend_that_serves_is_chosen():
    reasons = choose_backend(PLAIN, CPU)[1]
    fitting = [name for name, reason in reasons.items() if reason is None]
    assert list(reasons) == list(BACKENDS)
    assert choose_backend(PLAIN, CPU)[0].name == fitting[0] != "reference"


def test_an_explanation_covers_every_backend():
    explained = explain_backend(PLAIN, CPU)
    assert list(explained) == list(BACKENDS)
    assert explained["reference"] == "a faster one serves"
    assert list(explained.values()).count("chosen") == 1
    assert "group_size is 20" in explain_backend(ODD, CPU)["aten"]


def test_other_devices_are_served_by_the_reference():
    explained = explain_backend(PLAIN, torch.device("cuda"))
    assert explained["reference"] == "chosen"
    assert "not on cuda" in explained["aten"]


def test_a_backend_can_be_forced_and_a_wrong_name_lists_the_valid_ones(monkeypatch):
    monkeypatch.setenv("FXQUANT_BACKEND", "reference")
    assert choose_backend(PLAIN, CPU)[0].name == "reference"
    assert "FXQUANT_BACKEND forces reference" in explain_backend(PLAIN, CPU)["aten"]
    monkeypatch.setenv("FXQUANT_BACKEND", "refrence")
    with pytest.raises(OptionError, match="'aten_int8', 'reference'.*Did you mean 'reference'"):
        choose_backend(PLAIN, CPU)


def test_forcing_a_backend_that_cannot_serve_a_layer_says_what_serves(monkeypatch):
    monkeypatch.setenv("FXQUANT_BACKEND", "aten")
    with pytest.raises(OptionError, match="group_size is 20.*set it to 'reference'"):
        choose_backend(ODD, CPU)
    monkeypatch.setenv("FXQUANT_BACKEND", "reference")
    assert choose_backend(ODD, CPU)[0].name == "reference"
