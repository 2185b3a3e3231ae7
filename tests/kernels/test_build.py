"""The C++ kernel is an optional part of an installation."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_without_a_compiler_the_build_succeeds_and_says_what_is_missing(tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp"]
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    run = subprocess.run(
        [*command, tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "WITHOUT its C++ kernel" in run.stderr + run.stdout
    assert "Install a C++17 compiler and reinstall" in run.stderr + run.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_building_needs_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["build-system"]["requires"] == ["setuptools>=77", "pybind11>=2.6"]
    assert "torch" not in (ROOT / "setup.py").read_text()
