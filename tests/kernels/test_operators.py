"""The operators of exported programs, which Python and csrc/torch register."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fxquant.kernels import attention, native

FOLDER = Path(native.__file__).parent / "csrc" / "torch"


def test_both_registrations_have_one_schema():
    header = (FOLDER / "schemas.h").read_text()
    found = {}
    for _, text in re.findall(r"char\* (\w+) =\s+((?:\"[^\"]*\"\s*)+);", header):
        schema = "".join(re.findall(r'"([^"]*)"', text))
        found[schema.partition("(")[0]] = torch._C.parse_schema(schema)
    python = (native.LINEAR_SCHEMA, attention.ATTENTION_SCHEMA)
    assert found == {s.partition("(")[0]: torch._C.parse_schema(s) for s in python}


def test_every_operator_of_the_namespace_has_a_schema_in_c():
    header = (FOLDER / "schemas.h").read_text()
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fxquant::")}
    assert names == {f"fxquant::{name}" for name in re.findall(r'= *\n? *"(\w+)\(', header)}


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_library_for_processes_without_python_fits_the_headers_of_torch():
    """Only what the compiler reads: tests/runtimes builds it and runs it."""
    settings = (FOLDER / "CMakeLists.txt").read_text()
    target = re.search(r"TORCH_TARGET_VERSION=0x\w+", settings)[0]
    include = Path(torch.__file__).parent / "include"
    subprocess.run(
        ["c++", "-std=c++17", "-fsyntax-only", f"-D{target}", f"-isystem{include}", "-Wall",
         "-Wextra", "-Werror", "operators.cpp"],
        cwd=FOLDER, check=True,
    )  # fmt: skip
