"""Two processes share runs; each must have the bits that one process alone gets."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.worker import SHARED, state_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What both processes got, by scenario."""
    folder = tmp_path_factory.mktemp("shared")
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
        assert (found["said"], found["db"]) == (alone["said"], alone["db"])


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
