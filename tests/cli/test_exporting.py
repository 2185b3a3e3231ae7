import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import fxquant
from fxquant.cli.main import cli
from tests.exporters.conftest import IDS, SMALL


def run(*arguments, status=0):
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig.from_dict(SMALL.to_dict())).save_pretrained(folder)
    return folder


def saved(base, path, **options):
    model = LlamaForCausalLM.from_pretrained(base).eval()
    graph, info = fxquant.quantize(model, example_inputs=IDS, group_size=32, **options)
    fxquant.save_model(graph, path, info)
    return graph


def test_a_saved_file_becomes_a_folder(base, tmp_path):
    graph = saved(base, tmp_path / "model.safetensors", target="gptq", symmetric=False)
    options = ("--format", "gptq", "--base", base)
    text = run("export", tmp_path / "model.safetensors", tmp_path / "new", *options).stdout
    assert "advice" in text
    assert "vLLM refuses asymmetric" in text
    assert f"written to {tmp_path / 'new'}" in text
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.qweight"].shape == (16, 256)
    assert graph.get_submodule("model.layers.0.mlp.up_proj").bits == 4


def test_what_would_be_lost_is_listed_and_nothing_is_written(base, tmp_path):
    saved(base, tmp_path / "model.safetensors", symmetric=False)
    options = ("--format", "awq", "--base", base)
    for more in ((), ("--check",)):
        result = run(
            "export", tmp_path / "model.safetensors", tmp_path / "new", *options, *more, status=1
        )
        assert "nothing is written" in result.stdout
        assert result.stdout.count("refused") == 7
    found = run(
        "export", tmp_path / "model.safetensors", tmp_path / "new", *options, "--json", status=1
    )
    record = json.loads(found.stdout)
    assert record["written"] is None
    assert all(f["is_loss"] and 'target="awq"' in f["remedy"] for f in record["findings"])
    assert not (tmp_path / "new").exists()


def test_options_of_a_format_are_passed_on(base, tmp_path):
    saved(base, tmp_path / "model.safetensors")
    command = ("export", tmp_path / "model.safetensors", tmp_path / "new", "--format", "gptq")
    run(*command, "--base", base, "--option", "max_shard_bytes=50000", "--check")
    assert not (tmp_path / "new").exists()
    run(*command, "--base", base, "--option", "max_shard_bytes=50000")
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 3
    assert "no =" in run(*command, "--option", "x", status=2).stderr
    assert "unknown options ['x']" in run(*command, "--option", "x=1", status=2).stderr
    assert "base" in run(*command, status=2).stderr


def test_quantize_takes_a_target(tmp_path):
    arguments = ("tests.test_cli:build", "--group-size", 32, "--dry-run", "--json")
    record = json.loads(run("quantize", *arguments, "--target", "awq").stdout)
    assert record["config"]["target"] == "awq"
    assert record["config"]["zero_points"] == "integer"
