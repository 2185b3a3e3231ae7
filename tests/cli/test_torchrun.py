import json

import torch.distributed as dist
from click.testing import CliRunner

import fxquant
from fxquant.cli.main import cli
from fxquant.cli.output import Output
from fxquant.cli.torchrun import torchrun_group


def as_if_torchrun_had_started_it(monkeypatch, tmp_path):
    """The environment of the one process of a group."""
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    init = dist.init_process_group
    store = dist.FileStore(str(tmp_path / "store"), 1)

    def init_here(backend, timeout):
        init(backend, store=store, rank=0, world_size=1, timeout=timeout)

    monkeypatch.setattr(dist, "init_process_group", init_here)


def test_a_command_makes_its_group_and_leaves_none(monkeypatch, tmp_path):
    as_if_torchrun_had_started_it(monkeypatch, tmp_path)
    with torchrun_group() as is_first:
        assert is_first
        assert dist.get_backend() == "gloo"
    assert not dist.is_initialized()
    result = CliRunner().invoke(
        cli, ["quantize", "tests.models:Plain", "--output", str(tmp_path / "a.safetensors")]
    )
    assert result.exit_code == 0, result.output
    assert not dist.is_initialized()
    assert fxquant.load_model(tmp_path / "a.safetensors")


def test_without_torchrun_there_is_no_group():
    with torchrun_group() as is_first:
        assert is_first
        assert not dist.is_initialized()


def test_only_the_first_process_speaks(capsys):
    for is_muted in (True, False):
        with Output(True, is_muted=is_muted).running() as out:
            out.title("Layers")
            out.text("all of them")
            out.result({"layers": 3})
    said = capsys.readouterr()
    assert json.loads(said.out) == {"layers": 3}
    assert said.err.count("all of them") == said.err.count("Layers") == 1
