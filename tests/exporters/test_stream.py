"""A folder quantized tensor by tensor: the same bits however often it was interrupted."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fxquant
from fxquant.algorithms.rtn import round_to_nearest
from fxquant.cli.main import cli
from fxquant.errors import OptionError, SaveError
from fxquant.exporters import stream
from fxquant.exporters.compressed_tensors import CompressedTensors
from fxquant.exporters.folder_reader import FolderReader
from fxquant.exporters.unfinished import UnfinishedFolder
from tests.exporters.folders import digest

ROOT = Path(__file__).parents[2]
CONFIG = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=64, tie_word_embeddings=True,
)  # fmt: skip
OPTIONS = {"group_size": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source")
    LlamaForCausalLM(CONFIG).bfloat16().save_pretrained(folder, max_shard_size="300KB")
    (folder / "notes.txt").write_text("kept")
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(stream, "SHARD_BYTES", 10**5)


@pytest.mark.usefixtures("small_shards")
def test_the_new_folder_holds_each_weight_rounded_on_its_own(source, tmp_path):
    info = fxquant.quantize_checkpoint(source, tmp_path / "new", OPTIONS)
    old, new = FolderReader(source), FolderReader(tmp_path / "new")
    assert len(set(new.files.values())) > 3
    assert len(info.selected_layers) == 21
    assert (tmp_path / "new" / "notes.txt").read_text() == "kept"
    assert new.config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert {d.module: d.action for d in info.decisions}["lm_head"] == "float"
    reader = CompressedTensors()
    for name in info.selected_layers:
        weight = old.tensor(f"{name}.weight")
        expected = round_to_nearest(weight, group_size=32).dequantize()
        assert torch.equal(reader.read_layer(new, name).weight(), expected)
    rest = [n for n in old.files if n.removesuffix(".weight") not in info.selected_layers]
    assert rest
    for name in rest:
        assert torch.equal(old.tensor(name), new.tensor(name))
    assert info.compression_ratio > 2
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.usefixtures("small_shards")
def test_a_run_that_failed_goes_on_and_ends_in_the_same_bits(source, tmp_path, monkeypatch):
    fxquant.quantize_checkpoint(source, tmp_path / "whole", OPTIONS)
    accept, made = UnfinishedFolder.accept, []

    def failing(self, number):
        made.append(number)
        if len(made) == 3:
            raise KeyboardInterrupt
        accept(self, number)

    monkeypatch.setattr(UnfinishedFolder, "accept", failing)
    with pytest.raises(KeyboardInterrupt):
        fxquant.quantize_checkpoint(source, tmp_path / "new", OPTIONS)
    assert not (tmp_path / "new").exists()
    with pytest.raises(SaveError, match="interrupted run of another.*resume=False"):
        fxquant.quantize_checkpoint(source, tmp_path / "new", {"group_size": 64})
    made.clear()
    made += [-1, -1, -1]
    fxquant.quantize_checkpoint(source, tmp_path / "new", OPTIONS)
    assert made[3] == 2  # the two before it were there
    assert digest(tmp_path / "new") == digest(tmp_path / "whole")
    with pytest.raises(SaveError, match="something there already"):
        fxquant.quantize_checkpoint(source, tmp_path / "new", OPTIONS)


@pytest.mark.usefixtures("small_shards")
def test_without_resuming_a_run_begins_anew(source, tmp_path):
    work = tmp_path / "new.unfinished" / ".fxquant"
    work.mkdir(parents=True)
    (work / "run.json").write_text("{}")
    (work.parent / "model-00001-of-00009.safetensors").write_text("junk")
    fxquant.quantize_checkpoint(source, tmp_path / "new", OPTIONS, resume=False)
    assert {p.name for p in tmp_path.iterdir()} == {"new"}
    assert not (tmp_path / "new" / ".fxquant").exists()


SCRIPT = """
import sys, fxquant
from fxquant.exporters import stream
stream.SHARD_BYTES = 10**5
print("begin", flush=True)
fxquant.quantize_checkpoint(sys.argv[1], sys.argv[2], {"group_size": 32})
"""


@pytest.mark.usefixtures("small_shards")
def test_a_killed_process_is_gone_on_with(source, tmp_path):
    fxquant.quantize_checkpoint(source, tmp_path / "whole", OPTIONS)
    target, draw = tmp_path / "new", random.Random(0)
    command = [sys.executable, "-c", SCRIPT, str(source), str(target)]
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()
        work = tmp_path / "new.unfinished"
        wanted = draw.randint(1, 4)
        while process.poll() is None and len(list(work.glob("model-*"))) < wanted:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    if not target.exists():
        subprocess.run(command, cwd=ROOT, check=True, env=dict(os.environ))
    assert digest(target) == digest(tmp_path / "whole")


def test_what_cannot_be_streamed_is_refused_before_anything_is_written(source, tmp_path):
    target = tmp_path / "new"
    with pytest.raises(OptionError, match="without calibration data"):
        fxquant.quantize_checkpoint(source, target, {"method": "gptq"})
    for options in ({"bits": 3}, {"activation_bits": 8}, {"target": "awq"}):
        with pytest.raises(OptionError, match="target|compressed-tensors"):
            fxquant.quantize_checkpoint(source, target, options)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OptionError, match="cannot be read"):
        fxquant.quantize_checkpoint(tmp_path, target)
    fxquant.quantize_checkpoint(source, target, OPTIONS)
    with pytest.raises(OptionError, match="quantized already"):
        fxquant.quantize_checkpoint(target, tmp_path / "again")
    other = tmp_path / "other"
    other.mkdir()
    for path in source.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 256}))
    with pytest.raises(OptionError, match="no tensor .* of shape"):
        fxquant.quantize_checkpoint(other, tmp_path / "again")


def test_what_the_format_cannot_hold_is_avoided(source, tmp_path):
    with pytest.raises(OptionError, match="leave every layer float.*group_size that divides"):
        fxquant.quantize_checkpoint(source, tmp_path / "new", {"group_size": 96})
    assert not list(tmp_path.iterdir())
    options = {"group_size": 32, "symmetric": False, "bits": {"*.q_proj": 8, "*.up_proj": 4}}
    options["accuracy_warning"] = "ignore"  # most stays float
    fxquant.quantize_checkpoint(source, tmp_path / "mixed", options)
    old, new = FolderReader(source), FolderReader(tmp_path / "mixed")
    name = "model.layers.1.mlp.up_proj"
    found = CompressedTensors().read_layer(new, name).weight()
    weight = old.tensor(f"{name}.weight").float()
    assert fxquant.sqnr_db(weight, found) > 18
    assert len(new.config["quantization_config"]["config_groups"]) == 2


def test_a_model_without_linear_layers_is_refused_with_the_reasons_and_a_way(tmp_path):
    config = GPT2Config(
        vocab_size=50, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "float")
    expected = "times: type is skipped.*4 times: Conv1D is no layer.*in memory, with quantize"
    with pytest.raises(OptionError, match=expected):
        fxquant.quantize_checkpoint(tmp_path / "float", tmp_path / "new", {"group_size": 16})
    assert not (tmp_path / "new").exists()


def test_the_command_line_makes_a_folder_of_a_folder(source, tmp_path):
    target = tmp_path / "new"
    command = ["quantize", str(source), "--output", str(target), "--group-size", "32"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert "21 quantized" in done.output
    with safe_open(target / "model.safetensors", framework="pt") as file:
        assert any(name.endswith("weight_packed") for name in file.keys())  # noqa: SIM118
