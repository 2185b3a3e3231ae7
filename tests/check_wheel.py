"""Run by `make test-wheel` in a fresh environment: the wheel has all that an installation needs."""

import json
import subprocess
import sys
from pathlib import Path

import fxquant
from fxquant.kernels.extension import NOT_BUILT


def command(*arguments: str) -> str:
    program = Path(sys.executable).parent / "fxquant"
    run = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def main() -> None:
    assert Path(fxquant.__file__).is_relative_to(sys.prefix), "imported from the checkout"
    assert NOT_BUILT is None, NOT_BUILT
    assert command("--version").strip().endswith(fxquant.__version__)
    findings = {f["what"]: f["found"] for f in json.loads(command("doctor", "--json"))["findings"]}
    assert len(fxquant.calibration_text()) == 512
    assert "native" in findings["INT4 product"], findings
    assert json.loads(command("demo", "--json"))["reload_is_identical"] is True
    sources = Path(fxquant.__file__).parent / "kernels" / "csrc"  # for programs without Python
    assert (sources / "torch" / "CMakeLists.txt").is_file()
    assert {"linear.cpp", "linear.h", "amx.cpp"} <= {path.name for path in sources.iterdir()}
    print(f"wheel: fxquant {fxquant.__version__}, {findings['C++ kernel']}")


if __name__ == "__main__":
    main()
