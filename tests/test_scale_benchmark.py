"""The benchmark of memory and time runs, on its small model."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "scale.py"


def test_it_prints_memory_and_seconds_of_each_row(tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, SCRIPT, "forward", "gptq", "folder", "--small", "--json", path]
    subprocess.run(command, check=True, timeout=600)
    forward, gptq, folder = json.loads(path.read_text())["rows"]
    assert (forward["what"], gptq["what"], folder["what"]) == ("forward", "gptq", "folder")
    assert folder["layers"] == 14
    assert 0 <= folder["memory beside the model, MB"] < 100
    assert gptq["layers"] == 14
    assert 0 <= forward["memory beside the model, MB"] < 100
    assert 0 < gptq["memory beside the model, MB"] < 100
    assert 0 < forward["CPU s"] < gptq["CPU s"]
    assert "predicted MB" not in forward
    assert gptq["ratio of MB"] > 0 < folder["ratio of s"]
