import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner

import fxquant
from fxquant.cli.main import cli
from tests import models


def build():
    torch.manual_seed(0)
    return models.Plain()


def batches():
    return [torch.randn(32, 5, models.WIDTH), torch.randn(32, 5, models.WIDTH)]


def run(*arguments, status=0):
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


SOURCE = ("tests.test_cli:build", "--group-size", 32)
DATA = ("--data", "tests.test_cli:batches")


def test_help_teaches():
    text = run("--help").stdout
    for word in ("fxquant demo", "--dry-run", "Exit status", "inspect", "diff", "check"):
        assert word in text
    assert "package.module:function" in run("quantize", "--help").stdout


def test_quantize_saves_and_inspect_and_diff_read(tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    text = run("quantize", *SOURCE, *DATA, "--method", "rtn", "--output", one).stdout
    assert "first" in text
    assert "saved to" in text
    rtn = ("--method", "rtn", "--output", two, "--keep-float", "second")
    run("quantize", *SOURCE, *DATA, *rtn)
    assert "product weights that the graph can see: 100.0%" in run("inspect", one).stdout
    changes = json.loads(run("diff", one, two, "--json").stdout)
    rewritten = [c for c in changes["changes"] if c["status"] == "rewritten"]
    assert [c["module"] for c in rewritten] == ["second"]
    assert rewritten[0]["rule"] == "modules_to_not_convert: second"
    assert rewritten[0]["bytes_after"] > rewritten[0]["bytes_before"]


def test_a_dry_run_decides_without_quantizing():
    record = json.loads(run("quantize", *SOURCE, "--dry-run", "--json").stdout)
    assert [d["action"] for d in record["decisions"]] == ["int4", "float", "int4"]
    assert record["rows"] == []


def test_json_is_all_there_is_on_standard_output():
    for command in (("quantize", *SOURCE, *DATA), ("sensitivity", *SOURCE, *DATA)):
        assert json.loads(run(*command, "--json").stdout)["rows"]


def test_an_accuracy_bar_fails_with_status_one(tmp_path):
    command = ("quantize", *SOURCE, *DATA)
    path = tmp_path / "model.safetensors"
    assert "needs 90 dB" in run(*command, "--min-sqnr", 90, "--output", path, status=1).stderr
    assert not list(tmp_path.iterdir()), "a refused model left a file"
    run(*command, "--min-sqnr", 10, "--output", path)
    before = path.read_bytes()
    run(*command, "--min-sqnr", 90, "--output", path, status=1)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_check_holds_a_report_against_a_bar_and_a_baseline(tmp_path):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    run("sensitivity", *SOURCE, *DATA, "--output", good)
    report = json.loads(good.read_text())
    report["rows"][1]["introduced_sqnr_db"] -= 3
    bad.write_text(json.dumps(report))
    run("check", good, "--min-sqnr", 10)
    run("check", good, "--max-drop", 1, "--baseline", good)
    result = run("check", bad, "--max-drop", 1, "--baseline", good, status=1)
    assert "failed: second" in result.stdout
    assert "first" not in result.stdout
    failures = json.loads(run("check", good, "--min-sqnr", 99, "--json", status=1).stdout)[
        "failures"
    ]
    assert failures[0]["module"] == "model output"


@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "nowhere:build"),
        ("quantize", "tests.test_cli:missing"),
        ("quantize", "tests.test_cli:batches"),
        ("quantize", "missing.safetensors"),
        ("quantize", *SOURCE, "--keep-float", "frist"),
        ("sensitivity", *SOURCE),
        ("inspect", "missing.safetensors"),
        ("check", "missing.json", "--min-sqnr", "3"),
        ("quantize", *SOURCE, "--bits", "5"),
        ("nonsense",),
    ],
)
def test_wrong_use_has_status_two_and_says_why(command):
    assert run(*command, status=2).stderr


def test_names_of_a_file_cannot_command_the_terminal(tmp_path):
    graph, info = fxquant.quantize(
        torch.nn.Sequential(torch.nn.Linear(64, 64)), group_size=32, accuracy_warning="ignore"
    )
    row = dataclasses.replace(info.decisions[0], reason="\x1b[2J\u202egone")
    path = tmp_path / "m.safetensors"
    fxquant.save_model(graph, path, dataclasses.replace(info, decisions=[row]))
    shown = run("inspect", path).stdout
    assert "\\x1b[2J\\u202egone" in shown
    assert "\x1b[2J" not in shown
