import dataclasses
import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file

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
    for word in ("fxquant demo", "plan", "Exit status", "inspect", "diff", "check"):
        assert word in text
    assert "package.module:function" in run("quantize", "--help").stdout


def test_quantize_saves_and_inspect_and_diff_read(tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    text = run("quantize", *SOURCE, *DATA, "--method", "rtn", "--table", "--output", one).stdout
    assert "first" in text
    assert f"file         {one}" in text
    rtn = ("--method", "rtn", "--output", two, "--keep-float", "second")
    run("quantize", *SOURCE, *DATA, *rtn)
    assert "product weights that the graph can see: 100.0%" in run("inspect", one).stdout
    changes = json.loads(run("diff", one, two, "--json").stdout)
    rewritten = [c for c in changes["changes"] if c["status"] == "rewritten"]
    assert [c["module"] for c in rewritten] == ["second"]
    assert rewritten[0]["rule"] == "modules_to_not_convert: second"
    assert rewritten[0]["bytes_after"] > rewritten[0]["bytes_before"]


@pytest.mark.parametrize("command", [("plan",), ("quantize", "--dry-run")])
def test_a_plan_decides_without_quantizing(command):
    record = json.loads(run(*command, *SOURCE, "--json").stdout)
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
        ("quantize", *SOURCE, "--bits", "7"),
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


def noisy():
    print("the user's code prints")
    return build()


def failing():
    raise ValueError("no weights here")


def test_json_is_pure_even_if_the_users_code_prints():
    result = run("quantize", "tests.test_cli:noisy", "--group-size", 32, "--json")
    assert json.loads(result.stdout)["rows"]
    assert "the user's code prints" in result.stderr


def test_a_function_that_raises_is_wrong_use_with_its_traceback():
    stderr = run("quantize", "tests.test_cli:failing", status=2).stderr
    assert 'raise ValueError("no weights here")' in stderr
    assert "it raised ValueError: no weights here. Expected a function" in stderr


def test_the_summary_has_few_lines_and_says_where_the_rest_is():
    lines = run("quantize", *SOURCE, *DATA).stdout.splitlines()
    assert len(lines) <= 10
    text = "\n".join(lines)
    assert "2 quantized, 1 left float (--table lists them with the reasons)" in text
    assert "times smaller" in text
    assert "dB, measured on" in text
    assert "none: pass --output to save the model" in text


FILE = """
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))

def broken(
"""


def test_a_model_may_be_a_function_of_a_file_and_data_a_file_of_inputs(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE.replace("def broken(", ""))
    np.save(tmp_path / "x.npy", torch.randn(40, 64).numpy())
    save_file({"input": torch.randn(40, 64)}, tmp_path / "x.safetensors")
    for data in ("x.npy", "x.safetensors"):
        command = ("quantize", f"{path}:build", "--data", tmp_path / data, "--group-size", 32)
        record = json.loads(run(*command, "--json").stdout)
        assert record["calibration_samples_used"] == 40
        assert record["sqnr_db"] > 10
    stderr = run("quantize", f"{path}:bild", status=2).stderr
    assert "has no 'bild'" in stderr
    assert "Did you mean 'build'?" in stderr
    path.write_text(FILE)
    stderr = run("quantize", f"{path}:build", status=2).stderr
    assert "SyntaxError" in stderr


def test_a_recipe_and_options_make_one_config(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('bits = 8\ngroup_size = 32\nmethod = "rtn"\n')
    command = ("quantize", "tests.test_cli:build", *DATA, "--config", recipe, "--json")
    config = json.loads(run(*command, "--bits", 4).stdout)["config"]
    assert (config["bits"], config["group_size"], config["method"]) == (4, 32, "rtn")
    record = json.loads(run("quantize", *SOURCE, *DATA, "--average-bits", 6, "--json").stdout)
    bits = record["config"]["bits"].values()  # of layers of one size
    assert 5 < sum(bits) / len(bits) <= 6
    assert "Did you mean 'w4a8'" in run("quantize", *SOURCE, "--config", "w4a9", status=2).stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a small causal language model and a tokenizer of characters."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    letters = {chr(32 + i): i for i in range(95)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token=" "))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def test_a_model_may_be_a_folder_with_a_checkpoint_and_data_a_text(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("In the beginning was the word. " * 200)
    command = ("quantize", checkpoint, "--data", text, "--group-size", 32, "--method", "rtn")
    record = json.loads(run(*command, "--json").stdout)
    assert record["calibration_samples_used"] == 31 * 200 // 256
    assert sum(d["action"] == "int4" for d in record["decisions"]) == 7
    planned = json.loads(run("plan", *command[1:], "--memory", "1MB", "--json").stdout)
    chosen = [
        {d["module"] for d in r["decisions"] if d["action"] == "int4"} for r in (planned, record)
    ]
    assert chosen[0] == chosen[1]
    assert planned["forecast"]["spilled_bytes"] > 0
    assert "on this machine: tracing" in run("quantize", *command[1:], "--dry-run").stdout
    text.write_text("")
    assert "a text of 0 tokens" in run(*command, status=2).stderr
    assert "cannot load" in run("quantize", tmp_path, status=2).stderr
    assert "cannot be read as text" in run("quantize", *SOURCE, "--data", text, status=2).stderr


MODEL = models.Plain()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("no_folder", "a name without a colon"),  # nor a file: it would be read as one
        ("model.py", "a name without a colon"),
        (":build", "nothing before the colon"),
        ("tests.test_cli:DATA", "'DATA' is no function but a tuple"),
        ("tests.test_cli:", "has no ''"),
    ],
)
def test_a_source_that_names_no_function_is_refused(source, text):
    assert text in run("plan", source, status=2).stderr


def test_a_model_may_be_named_itself():
    record = json.loads(run("plan", "tests.test_cli:MODEL", "--group-size", 32, "--json").stdout)
    assert {row["module"] for row in record["decisions"]} >= {"first", "second"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("quantize", *SOURCE, *DATA, "--min-sqnr", "nan"), "--min-sqnr: got nan"),
        (("sensitivity", SOURCE[0], *DATA, "--group-size", 0), "group_size: got 0"),
        (("quantize", *SOURCE, "--data", __file__), "is no folder with a tokenizer"),
    ],
)
def test_an_option_that_means_nothing_is_refused_before_any_work(options, text, tmp_path):
    file = tmp_path / "m.safetensors"
    assert text in run(*options, "--output", file, status=2).stderr
    assert not file.exists()


def test_what_was_not_measured_meets_no_threshold(tmp_path):
    file = tmp_path / "m.safetensors"
    text = run("quantize", *SOURCE, "--min-sqnr", -5, "--output", file, status=1).stderr
    assert "not measured, needs -5 dB" in text
    assert not file.exists()
