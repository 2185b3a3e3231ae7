"""Two processes share runs; each must have the bits that one process alone gets."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed.worker import FOLDERS, SHARED, exact, quantize_folder, state_of
from tests.exporters.folders import digest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a Llama of two blocks and several shards as `source`."""
    made = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=32, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(made / "source", max_shard_size="60KB")
    return made


@pytest.fixture(scope="module")
def shared(folder):
    """What both processes got, by scenario."""
    command = [sys.executable, "-m", "tests.distributed.worker"]
    running = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=ROOT, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=1500)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0, 3], said
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_have_the_bits_of_one(shared, name):
    alone = state_of(SHARED[name]())
    for results in shared:
        found = results[name]
        assert found["state"].keys() == alone["state"].keys()
        for key, tensor in alone["state"].items():
            assert torch.equal(found["state"][key], tensor), key
        assert (found["said"], found["figures"]) == (alone["said"], alone["figures"])


def test_layers_that_are_measured_by_two_processes_have_the_errors_of_one(shared):
    assert shared[0]["exact"] == shared[1]["exact"] == exact()


@pytest.mark.parametrize("method", FOLDERS)
def test_a_folder_that_two_processes_make_has_the_bits_of_one(shared, folder, method, tmp_path):
    alone = quantize_folder(folder / "source", tmp_path / "alone", method)
    assert [results[f"{method} folder"] for results in shared] == [alone, alone]
    assert digest(folder / method) == digest(tmp_path / "alone")


def test_processes_that_were_given_different_data_say_so(shared):
    for results in shared:
        text = "OptionError: calibration data: got another one in process 1 than in process 0."
        assert results["other data"].startswith(text)


def test_an_error_in_one_process_ends_both(shared):
    first, second = (results["one fails"] for results in shared)
    assert second == "MemoryError: no more room"
    said = "ProcessGroupError: process 1 of 2: it failed: MemoryError: no more room."
    assert first.startswith(said)


def test_a_process_that_vanishes_ends_the_other(shared):
    assert shared[0]["one vanishes"].startswith("ProcessGroupError: process group: ")
    assert "one vanishes" not in shared[1]
